"""The manifests against the code: what they name exists, and their times fit."""

from typing import Any

import pytest

from service.gateway.process import MAX_STOP_SECONDS, POLL_SECONDS, RESOLVE_SECONDS
from service.gateway.settings import GatewaySettings
from service.options import parse_serve
from service.serving import READY_SECONDS
from service.torchserve.config import ServerConfig
from service.torchserve.server import READ_SECONDS, STOP_SECONDS
from tests import ROOT
from tests.container.known import check_variables
from tests.kubernetes.rendered import RELEASES, Object, container, key, of_kind, pod, release

ENDPOINTS_SECONDS = 2  # until a pod that goes has left the name's addresses
DNS_SECONDS = 30  # for which CoreDNS, and a cache on the node, repeat an answer
RELOAD_SECONDS = 1  # of nginx

each_release = pytest.mark.parametrize("name", RELEASES)


def settings_of(name: str, component: str) -> dict[str, str]:
    """The environment of a component's container."""
    found = container(of_kind(release(name), "Deployment")[component])
    (source,) = found["envFrom"]
    config = of_kind(release(name), "ConfigMap")[component]
    assert source["configMapRef"]["name"] == config["metadata"]["name"]
    return dict(config["data"]) | {one["name"]: one["value"] for one in found["env"]}


def prefix(name: str) -> str:
    return "canary-classifier" if name == "canary" else "classifier"


@each_release
def test_variables_and_options_are_known_to_the_code(name: str) -> None:
    for component in ("gateway", "replica"):
        check_variables(settings_of(name, component))
    script, *options = container(of_kind(release(name), "Deployment")["replica"])["args"]
    assert (ROOT / script).is_file()
    args = parse_serve(options)
    foreign = name in ("modelcar", "volume")
    assert args.archives == ("/models" if foreign else "model_store",)
    assert args.require_signed == ("/run/signer/public.pem" if foreign else "off")
    assert args.device == ("cuda" if name in ("gpu", "modelcar") else "cpu")
    assert settings_of(name, "replica")["CLASSIFIER_ENV"] == "production"


@each_release
def test_addresses_are_those_that_are_listened_on(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in settings_of(name, "replica").items():
        monkeypatch.setenv(variable, value)
    deployments = of_kind(release(name), "Deployment")
    host = parse_serve(container(deployments["replica"])["args"][1:]).host
    listens = ServerConfig.load(host).addresses
    ports = {
        one["name"]: one["containerPort"] for one in container(deployments["replica"])["ports"]
    }
    assert ports == {
        "predictions": listens.inference.port,
        "management": listens.management.port,
        "metrics": listens.metrics.port,
    }
    assert {one.host for one in (listens.inference, listens.management, listens.metrics)} == {
        "0.0.0.0"
    }
    gateway = settings_of(name, "gateway")
    address = f"{prefix(name)}-replica"
    assert gateway["GATEWAY_UPSTREAMS"] == f"{address}:{ports['predictions']}"
    assert gateway["GATEWAY_MANAGEMENT"] == f"{address}:{ports['management']}"
    assert (
        f"getent hosts {address};" in pod(deployments["gateway"])["initContainers"][0]["command"][2]
    )
    expected = [{"name": "http", "containerPort": GatewaySettings.port}]
    if grpc := gateway.get("GATEWAY_GRPC_PORT"):
        expected.append({"name": "grpc", "containerPort": int(grpc)})
    assert container(deployments["gateway"])["ports"] == expected
    names = [port["name"] for port in expected]
    balanced = of_kind(release(name), "Service")["gateway"]["spec"]["ports"]
    assert [port["targetPort"] for port in balanced] == names
    (opened,) = of_kind(release(name), "NetworkPolicy")["gateway"]["spec"]["ingress"]
    assert [port["port"] for port in opened["ports"]] == names
    service = of_kind(release(name), "Service")["replica"]
    assert service["metadata"]["name"] == address
    assert service["spec"]["clusterIP"] == "None"  # its name stands for the replicas' addresses
    assert "publishNotReadyAddresses" not in service["spec"]  # and for those that are ready alone


def chosen(selector: dict[str, str], objects: list[Object]) -> list[str]:
    """The Deployments whose pods a selector takes."""
    return [
        one["metadata"]["name"]
        for one in objects
        if one["kind"] == "Deployment"
        and selector.items() <= one["spec"]["template"]["metadata"]["labels"].items()
    ]


@each_release
def test_selectors_take_the_pods_of_their_own_component(name: str) -> None:
    """And no other release's: both are in the cluster at once."""
    other = "default" if name == "canary" else "canary"
    objects = [*release(name), *release(other)]
    for one in release(name):
        spec = one.get("spec", {})
        selector = spec.get("podSelector", spec.get("selector"))
        if selector is not None:
            expected = [one["metadata"]["name"]]
            assert chosen(selector.get("matchLabels", selector), objects) == expected, key(one)
        if one["kind"] == "Deployment":
            for spread in pod(one)["topologySpreadConstraints"]:
                found = chosen(spread["labelSelector"]["matchLabels"], objects)
                assert found == [one["metadata"]["name"]]


@each_release
def test_names_that_are_referred_to_exist(name: str) -> None:
    known = {key(one) for one in release(name)}
    made_by_hand = {
        ("Secret", "classifier-keys"),
        ("ConfigMap", "classifier-public-key"),
        ("PersistentVolumeClaim", "classifier-archives"),
    }
    for one in release(name):
        assert set(references(one["kind"], one.get("spec"))) <= known | made_by_hand


def references(kind: str, spec: Any) -> list[tuple[str, str]]:
    if kind == "Deployment":
        inside = spec["template"]["spec"]
        found = [("ServiceAccount", inside["serviceAccountName"])]
        for volume in inside["volumes"]:
            if "secret" in volume:
                found.append(("Secret", volume["secret"]["secretName"]))
            if "configMap" in volume:
                found.append(("ConfigMap", volume["configMap"]["name"]))
            if "persistentVolumeClaim" in volume:
                found.append(
                    ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"])
                )
        mounts = {mount["name"] for one in inside["containers"] for mount in one["volumeMounts"]}
        assert mounts == {volume["name"] for volume in inside["volumes"]}
        return found
    if kind in ("HorizontalPodAutoscaler", "ScaledObject"):
        return [("Deployment", spec["scaleTargetRef"]["name"])]
    if kind == "HTTPRoute":
        return [("Service", one["name"]) for rule in spec["rules"] for one in rule["backendRefs"]]
    return []


@each_release
def test_an_autoscaler_has_the_replicas_for_itself(name: str) -> None:
    scaled = {"HorizontalPodAutoscaler", "ScaledObject"} & {one["kind"] for one in release(name)}
    replicas = "replicas" in of_kind(release(name), "Deployment")["replica"]["spec"]
    assert replicas != bool(scaled)


@each_release
def test_a_replica_is_forgotten_before_it_stops(name: str) -> None:
    """TorchServe cuts off what its workers have in hand, so the gateway must be done with it."""
    response = int(settings_of(name, "gateway")["GATEWAY_RESPONSE_TIMEOUT_SECONDS"])
    last = response - max(
        1, response // 4
    )  # the second try of a request: service/gateway/config.py
    looked_up = ENDPOINTS_SECONDS + DNS_SECONDS + RESOLVE_SECONDS + 2 * POLL_SECONDS  # seen twice
    replica = of_kind(release(name), "Deployment")["replica"]
    waits = container(replica)["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert waits >= looked_up + RELOAD_SECONDS + last
    grace = pod(replica)["terminationGracePeriodSeconds"]
    assert grace >= waits + STOP_SECONDS + READ_SECONDS + 5


@each_release
def test_a_gateway_answers_what_it_has_accepted(name: str) -> None:
    response = int(settings_of(name, "gateway")["GATEWAY_RESPONSE_TIMEOUT_SECONDS"])
    assert response <= MAX_STOP_SECONDS  # else a stop cuts off the slowest
    gateway = of_kind(release(name), "Deployment")["gateway"]
    waits = container(gateway)["lifecycle"]["preStop"]["sleep"]["seconds"]
    stops = response + 5  # first gRPC's server, then nginx
    if "GATEWAY_GRPC_PORT" in settings_of(name, "gateway"):
        stops *= 2
    assert pod(gateway)["terminationGracePeriodSeconds"] >= waits + stops + 10
    assert 10 <= waits < 30


@each_release
def test_a_replica_has_the_time_to_start_that_the_launcher_gives_it(name: str) -> None:
    probe = container(of_kind(release(name), "Deployment")["replica"])["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= READY_SECONDS
    script = probe["exec"]["command"][1]
    assert (ROOT / script).is_file()


def test_probes_ask_what_the_gateway_answers() -> None:
    pages = (ROOT / "deploy" / "gateway" / "server.conf").read_text()
    gateway = container(of_kind(release("default"), "Deployment")["gateway"])
    probes = {one: gateway[one]["httpGet"]["path"] for one in gateway if one.endswith("Probe")}
    assert probes == {
        "startupProbe": "/livez",
        "readinessProbe": "/health",
        "livenessProbe": "/livez",
    }
    assert all(f"location = {path} {{" in pages for path in probes.values())


@pytest.mark.parametrize("name", ["default", "cpu", "canary"])
def test_memory_is_what_the_capacity_of_docs_says(name: str) -> None:
    """0.3 GB + 0.6 GB a worker + 1.4 GB for large images; a worker a core."""
    resources = container(of_kind(release(name), "Deployment")["replica"])["resources"]
    assert resources["requests"] == resources["limits"]
    cores = int(resources["limits"]["cpu"])
    assert resources["limits"]["memory"] == f"{round((0.3 + 0.6 * cores + 1.4) * 1000)}M"


@each_release
def test_only_the_gateway_reaches_management(name: str) -> None:
    policies = of_kind(release(name), "NetworkPolicy")
    (by_gateway, by_prometheus) = policies["replica"]["spec"]["ingress"]
    (peer,) = by_gateway["from"]
    assert chosen(peer["podSelector"]["matchLabels"], release(name)) == [f"{prefix(name)}-gateway"]
    assert by_gateway["ports"] == [{"port": "predictions"}, {"port": "management"}]
    assert by_prometheus["ports"] == [{"port": "metrics"}]
    assert set(by_prometheus["from"][0]) == {"namespaceSelector"}
    assert policies["replica"]["spec"]["egress"] == []
    (clients,) = policies["gateway"]["spec"]["ingress"]
    assert set(clients) == {"ports"}  # from everywhere; which: see above
    for policy in policies.values():
        assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]


@pytest.mark.parametrize("name", ["gpu", "modelcar"])
def test_a_gpu_is_asked_for(name: str) -> None:
    replica = of_kind(release(name), "Deployment")["replica"]
    assert container(replica)["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert container(replica)["image"].endswith("-cuda")
    assert replica["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}


def test_monitors_scrape_ports_that_are_there() -> None:
    deployments = of_kind(release("cpu"), "Deployment")
    for component, monitor in of_kind(release("cpu"), "PodMonitor").items():
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        assert endpoint["port"] in {
            one["name"] for one in container(deployments[component])["ports"]
        }
