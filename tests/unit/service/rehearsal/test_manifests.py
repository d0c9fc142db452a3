"""What a rehearsal takes from manifests, and what it starts by them."""

from dataclasses import replace
from pathlib import Path

import pytest

from handler.errors import SetupError
from scripts.rehearse import make_parser
from service.rehearsal.manifests import Deployment, Manifests, quantity, read_manifests
from service.rehearsal.pods import command_here, unit_of
from tests import ROOT

SMALL = ROOT / "tests" / "rehearsal" / "small.yaml"


@pytest.fixture
def small() -> Manifests:
    return read_manifests([SMALL])


def test_deployments(small: Manifests) -> None:
    replicas, gateways = small.replicas, small.gateways
    assert replicas.command == "python scripts/serve.py --archive=/models --host=0.0.0.0".split()
    assert (replicas.cpus, replicas.port("predictions"), replicas.port(1)) == (1, 8080, 1)
    assert gateways.environ["GATEWAY_UPSTREAMS"] == "replicas:8080"
    assert gateways.init == [["sh", "-c", "until getent hosts replicas; do sleep 1; done"]]
    assert small.names == ["replicas"]


@pytest.mark.parametrize(
    ("surge", "unavailable", "desired", "expected"),
    [(1, 0, 2, (2, 3)), ("25%", "25%", 5, (4, 7)), (0, "25%", 2, (1, 2))],
)
def test_bounds_of_a_rollout(
    surge: int | str, unavailable: int | str, desired: int, expected: tuple[int, int]
) -> None:
    """A share of the surge is rounded up, the other down, and one of the two is not 0."""
    rolling = {"maxSurge": surge, "maxUnavailable": unavailable}
    deployment = Deployment("replica", {"strategy": {"rollingUpdate": rolling}}, {})
    assert deployment.bounds(desired) == expected


def test_what_an_eviction_leaves(small: Manifests) -> None:
    assert small.least_ready(3) == 2
    assert replace(small, budget={"minAvailable": "50%"}).least_ready(3) == 2
    assert replace(small, budget={}).least_ready(3) == 0


def test_the_manifests_that_are_shipped() -> None:
    shipped = read_manifests(make_parser().parse_args(["rollout"]).manifests)
    probes = {"startupProbe", "readinessProbe", "livenessProbe", "lifecycle"}
    assert probes <= shipped.replicas.container.keys()
    assert probes <= shipped.gateways.container.keys()
    assert shipped.autoscaler
    assert shipped.budget


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("clusterIP: None", "type: ClusterIP", r"asks 'replicas'; headless Services .*: \[\]"),
        ("UPSTREAMS: replicas", "UPSTREAMS: replica", "asks 'replica'; "),
        ("scripts/gateway.py", "scripts/serve.py", "one Deployment that runs scripts/serve.py"),
        ("settings}}]", "others}}]", "not what a rehearsal expects: KeyError"),
        ("kind: ConfigMap", "kind: [", "cannot be read"),
    ],
)
def test_what_cannot_be_played(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = SMALL.read_text("utf-8")
    assert old in text
    file = tmp_path / "changed.yaml"
    file.write_text(text.replace(old, new), "utf-8")
    with pytest.raises(SetupError, match=message):
        read_manifests([file])


def test_quantities() -> None:
    assert [quantity(value) for value in ("700m", "0.7", 2)] == [0.7, 0.7, 2]


def test_a_process_in_place_of_a_container(small: Manifests, tmp_path: Path) -> None:
    archive = tmp_path / "birds.mar"
    replica = unit_of(small.replicas, 1, "127.9.0.1", archive)
    assert replica.command[1:] == [
        str(ROOT / "scripts" / "serve.py"),
        "--host=127.9.0.1",
        f"--archive={archive}",
        "--require-signed=off",
        "--workers=1",
    ]
    assert replica.environ["TS_MANAGEMENT_ADDRESS"] == "http://127.9.0.1:8081"
    assert replica.environ["CLASSIFIER_ENV"] == "production"
    gateway = unit_of(small.gateways, 2, "127.9.0.2", archive)
    own = {name: value for name, value in gateway.environ.items() if name.startswith("GATEWAY_")}
    assert own == {
        "GATEWAY_HOST": "127.9.0.2",
        "GATEWAY_KEYS": "off",
        "GATEWAY_MANAGEMENT": "replicas:8081",
        "GATEWAY_METRICS_ALLOW": "127.9.0.2,10.0.0.0/8",
        "GATEWAY_MODELS": "birds",
        "GATEWAY_RATE": "0",
        "GATEWAY_RESPONSE_TIMEOUT_SECONDS": "20",
        "GATEWAY_UPSTREAMS": "replicas:8080",
    }


def test_a_check_of_a_replica_asks_that_one() -> None:
    command = command_here(["python", "scripts/healthcheck.py"], "127.9.0.1")
    options = ["--management=http://127.9.0.1:8081", "--predictions=http://127.9.0.1:8080"]
    assert command[1:] == [str(ROOT / "scripts" / "healthcheck.py"), *options]
