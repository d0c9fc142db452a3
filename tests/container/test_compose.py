"""deploy/compose.yaml against its schema and against the code. Nothing is built or started."""

import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from scripts.healthcheck import main
from service.gateway.settings import GatewaySettings
from service.options import parse_serve
from service.torchserve.config import ServerConfig
from tests import ROOT
from tests.container.known import check_variables, dockerfile

DEPLOY = ROOT / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
LOCAL = yaml.safe_load((DEPLOY / "compose.local.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
OURS = [name for name, service in SERVICES.items() if service["image"] == "classifier"]
each_service = pytest.mark.parametrize("name", SERVICES)
each_of_ours = pytest.mark.parametrize("name", OURS)


@pytest.mark.parametrize("file", ["compose.yaml", "compose.local.yaml", "compose.grpc.yaml"])
def test_the_compose_specification_allows_it(file: str) -> None:
    tool = Path(sys.executable).with_name("check-jsonschema")
    done = subprocess.run(
        [tool, "--builtin-schema", "vendor.compose-spec", DEPLOY / file],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_grpc_is_published_where_it_is_served() -> None:
    gateway = yaml.safe_load((DEPLOY / "compose.grpc.yaml").read_text())["services"]["gateway"]
    check_variables(gateway["environment"])
    number = gateway["environment"]["GATEWAY_GRPC_PORT"]
    assert gateway["ports"] == [f"${{BIND:-127.0.0.1}}:{number}:{number}"]


@each_service
def test_a_service_has_no_rights_and_bounds(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all(entry.startswith("/tmp:size=") for entry in service["tmpfs"])
    assert service["restart"] == "unless-stopped"
    assert service["logging"]["driver"] == "json-file"
    assert set(service["logging"]["options"]) == {"max-size", "max-file"}
    assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory"}
    assert "healthcheck" in service or "HEALTHCHECK" in dockerfile()


def test_only_the_gateway_can_be_reached() -> None:
    assert [name for name, service in SERVICES.items() if "ports" in service] == ["gateway"]
    assert COMPOSE["networks"]["inside"]["internal"] is True
    outside = [name for name, service in SERVICES.items() if service["networks"] != ["inside"]]
    assert outside == ["gateway"]


def test_images_of_others_are_pinned() -> None:
    for service in SERVICES.values():
        if "build" not in service:
            image, _, tag = service["image"].partition(":")
            assert tag.strip("v").count(".") == 2, image


def test_services_start_in_the_order_of_their_health() -> None:
    for name, service in SERVICES.items():
        for needed, how in service.get("depends_on", {}).items():
            assert how == {"condition": "service_healthy"}, name
            assert needed in SERVICES
    assert "replica" in SERVICES["gateway"]["depends_on"]
    assert SERVICES["replica"]["deploy"]["replicas"] == 2


@each_of_ours
def test_build_arguments_are_those_of_the_dockerfile(name: str) -> None:
    build = SERVICES[name]["build"]
    assert (DEPLOY / build["context"]).resolve() == ROOT
    assert set(build["args"]) <= dockerfile()["ARG"].keys()


@each_of_ours
def test_commands_are_those_of_the_code(name: str) -> None:
    script, *options = SERVICES[name]["command"]
    assert (ROOT / script).is_file()
    if script == "scripts/serve.py":
        assert parse_serve(options).archives == ("model_store",)
    else:
        assert (script, options) == ("scripts/gateway.py", [])


def test_the_gateways_health_check_is_an_option_of_the_script(
    capsys: pytest.CaptureFixture[str],
) -> None:
    exec_form, python, script, *options = SERVICES["gateway"]["healthcheck"]["test"]
    assert (exec_form, python, script) == ("CMD", "python", "scripts/healthcheck.py")
    with pytest.raises(SystemExit):
        main([*options, "--help"])
    assert all(option in capsys.readouterr().out for option in options)


@each_of_ours
def test_variables_are_known_to_the_code(name: str) -> None:
    check_variables(SERVICES[name]["environment"])


def test_addresses_are_those_that_services_listen_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in SERVICES["replica"]["environment"].items():
        monkeypatch.setenv(key, value)
    host = parse_serve(SERVICES["replica"]["command"][1:]).host
    listens = ServerConfig.load(host).addresses
    assert {one.host for one in (listens.inference, listens.management, listens.metrics)} == {
        "0.0.0.0"
    }
    gateway = SERVICES["gateway"]["environment"]
    assert gateway["GATEWAY_UPSTREAMS"] == f"replica:{listens.inference.port}"
    assert gateway["GATEWAY_MANAGEMENT"] == f"replica:{listens.management.port}"
    (port,) = SERVICES["gateway"]["ports"]
    assert port.endswith(f":{GatewaySettings.port}:{GatewaySettings.port}")
    assert "GATEWAY_PORT" not in gateway

    prometheus = yaml.safe_load((DEPLOY / "monitoring" / "prometheus-compose.yml").read_text())
    found = {job["job_name"]: job["dns_sd_configs"] for job in prometheus["scrape_configs"]}
    assert found == {
        "classifier": [{"names": ["replica"], "type": "A", "port": listens.metrics.port}],
        "gateway": [{"names": ["gateway"], "type": "A", "port": GatewaySettings.port}],
    }
    (network,) = COMPOSE["networks"]["inside"]["ipam"]["config"]
    assert gateway["GATEWAY_METRICS_ALLOW"] == f"127.0.0.1,{network['subnet']}"
    url = urlsplit(SERVICES["grafana"]["environment"]["PROMETHEUS_URL"])
    assert (url.hostname, url.port) == ("prometheus", 9090)


def test_prometheus_does_the_same_for_compose_as_for_one_machine() -> None:
    folder = DEPLOY / "monitoring"
    here, compose = (
        yaml.safe_load((folder / name).read_text())
        for name in ("prometheus.yml", "prometheus-compose.yml")
    )
    assert [job.pop("job_name") for job in here.pop("scrape_configs")] == [
        job.pop("job_name") for job in compose.pop("scrape_configs")
    ]
    assert here == compose


def test_files_that_are_mounted_are_there() -> None:
    for name, service in SERVICES.items():
        for volume in service.get("volumes", []):
            source, target, *mode = volume.split(":")
            if source == "./keys":  # made by whoever runs it
                assert mode == ["ro"]
            elif source.startswith("."):
                assert (DEPLOY / source).is_dir(), name
                assert mode == ["ro"]
            else:
                assert source in COMPOSE["volumes"]
            assert target.startswith("/")
    config = SERVICES["prometheus"]["command"][0].removeprefix("--config.file=/etc/prometheus/")
    assert (DEPLOY / "monitoring" / config).is_file()


def test_keys_are_mounted_where_the_gateway_looks_and_never_committed() -> None:
    assert SERVICES["gateway"]["volumes"] == ["./keys:/run/keys:ro"]
    assert SERVICES["gateway"]["environment"]["GATEWAY_KEYS"] == "/run/keys/keys"
    assert "/deploy/keys" in (ROOT / ".gitignore").read_text().splitlines()


def test_the_local_file_changes_what_is_there() -> None:
    assert LOCAL["services"].keys() <= SERVICES.keys()
    for service in LOCAL["services"].values():
        assert set(service.get("networks", [])) <= COMPOSE["networks"].keys()
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert LOCAL["services"]["gateway"]["environment"]["GATEWAY_KEYS"] == "off"
