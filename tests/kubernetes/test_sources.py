"""One source: the chart. What kustomize makes is what helm makes."""

import shutil
from pathlib import Path

import pytest
import yaml

from handler.errors import SetupError
from scripts.manifests import main
from service.manifests import GENERATED, KUBERNETES, outdated, template
from tests import ROOT
from tests.kubernetes.rendered import (
    RELEASES,
    Object,
    combined,
    key,
    kustomized,
    load,
    of_kind,
    release,
)


def test_generated_files_are_as_helm_makes_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"]) == 0, capsys.readouterr().out


def test_a_stale_file_is_found(tmp_path: Path) -> None:
    copy = tmp_path / "kubernetes"
    shutil.copytree(KUBERNETES, copy, symlinks=True)
    (copy / "base" / "replica.yaml").write_text("replicas: 3\n")
    (copy / "components" / "keda" / "keda.yaml").unlink()
    assert set(outdated(copy)) == {
        copy / "base" / "replica.yaml",
        copy / "components" / "keda" / "keda.yaml",
    }


@pytest.mark.parametrize("name", GENERATED)
def test_every_generated_file_is_used(name: str) -> None:
    kustomization = yaml.safe_load((KUBERNETES / name / "kustomization.yaml").read_text())
    files = {path.name for path in (KUBERNETES / name).glob("*.yaml")}
    assert files == {*kustomization["resources"], "kustomization.yaml"}


def differences(one: list[Object], other: list[Object]) -> list[tuple[str, str]]:
    """Objects that only one side has, or that differ."""
    first, second = ({key(item): item for item in side} for side in (one, other))
    return [name for name in first | second if first.get(name) != second.get(name)]


@pytest.mark.parametrize(
    ("place", "name"),
    [("base", "default")] + [(f"overlays/{name}", name) for name in ("cpu", "gpu", "canary")],
)
def test_an_overlay_is_the_chart_with_its_values(place: str, name: str) -> None:
    assert differences(kustomized(KUBERNETES / place), release(name)) == []


@pytest.mark.parametrize(
    ("resource", "components", "name"),
    [
        ("overlays/gpu", ["modelcar"], "modelcar"),
        ("overlays/cpu", ["volume"], "volume"),
        ("overlays/cpu", ["grpc"], "grpc"),
        ("base", ["keda", "monitoring", "routes"], "keda"),
    ],
)
def test_components_are_the_chart_with_their_values(
    tmp_path: Path, resource: str, components: list[str], name: str
) -> None:
    assert differences(combined(tmp_path, resource, *components), release(name)) == []


def test_a_difference_is_found() -> None:
    found = differences(release("gpu"), release("cpu"))
    assert ("Deployment", "classifier-replica") in found
    assert ("HTTPRoute", "classifier") not in found


def test_every_overlay_has_values_of_its_name() -> None:
    folders = {path.name for path in (KUBERNETES / "overlays").iterdir()}
    assert folders < RELEASES.keys()
    assert {path.stem for path in (KUBERNETES / "chart").glob("values-*.yaml")} == {
        f"values-{file}" for files in RELEASES.values() for file in files
    }


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (["replica.repliccas=3"], "repliccas"),
        (["image.tag=latest"], "/image/tag"),
        (["archives.modelcar=registry.example.com/a:1"], "archives.publicKey is missing"),
        (
            ["archives.modelcar=a:1", "archives.claim=c", "archives.publicKey=k"],
            "exclude each other",
        ),
        (["routes.canary.weight=101"], "/routes/canary/weight"),
        (["routes.enabled=true", "routes.grpcHostnames={v2.test}"], "gateway.grpcPort is missing"),
    ],
)
def test_the_chart_refuses(values: list[str], words: str) -> None:
    with pytest.raises(SetupError) as refused:
        template(*[word for value in values for word in ("--set", value)])
    assert words in str(refused.value)


def test_rules_and_alerts_are_those_of_the_monitoring() -> None:
    (rule,) = [one for one in release("cpu") if one["kind"] == "PrometheusRule"]
    files = [ROOT / "deploy" / "monitoring" / name for name in ("rules.yml", "alerts.yml")]
    groups = [group for file in files for group in yaml.safe_load(file.read_text())["groups"]]
    assert rule["spec"]["groups"] == groups


def test_jobs_are_those_that_rules_take() -> None:
    monitors = of_kind(release("cpu"), "PodMonitor")
    scraped = yaml.safe_load((ROOT / "deploy/monitoring/prometheus.yml").read_text())
    jobs = {
        relabel["replacement"]
        for monitor in monitors.values()
        for endpoint in monitor["spec"]["podMetricsEndpoints"]
        for relabel in endpoint["relabelings"]
        if relabel["targetLabel"] == "job"
    }
    assert jobs == {job["job_name"] for job in scraped["scrape_configs"]}


def test_the_canary_gets_its_share() -> None:
    """Over HTTP and gRPC, by names of their own, at ports that its Service has."""
    text = template(
        "--set", "routes.enabled=true,routes.canary.release=canary-classifier",
        "--set", "routes.canary.weight=10,routes.grpcHostnames={v2.test},gateway.grpcPort=8001",
    )  # fmt: skip
    objects = load(text)
    routes = {one["kind"]: one["spec"] for one in objects if one["kind"].endswith("Route")}
    assert routes.keys() == {"HTTPRoute", "GRPCRoute"}
    assert routes["GRPCRoute"]["hostnames"] == ["v2.test"]
    services = {
        key(one)[1] for one in release("cpu") + release("canary") if key(one)[0] == "Service"
    }
    for kind, name in (("HTTPRoute", "http"), ("GRPCRoute", "grpc")):
        (rule,) = routes[kind]["rules"]
        shares = {backend["name"]: backend["weight"] for backend in rule["backendRefs"]}
        assert shares == {"classifier-gateway": 90, "canary-classifier-gateway": 10}
        assert shares.keys() <= services
        ports = of_kind(objects, "Service")["gateway"]["spec"]["ports"]
        (port,) = [one["port"] for one in ports if one["name"] == name]
        assert {backend["port"] for backend in rule["backendRefs"]} == {port}
