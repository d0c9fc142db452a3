"""This service before the kit: two models behind the gateway, over REST and gRPC."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from service.gateway.process import find_nginx
from tests.conformance.checks import FAIL, NOT_OFFERED
from tests.conformance.kit import examine, run
from tests.processes import free_port
from tests.server.serving import serving

MODELS = ("mobilenet_v2", "resnet50")
# All that is not tested, and why.
UNTESTED = {"the model's first input has one dimension": 1}


@dataclass
class Addresses:
    url: str
    grpc: str


@pytest.fixture(scope="module")
def us(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Addresses]:
    find_nginx()
    port, grpc = free_port(), free_port()
    models = [word for model in MODELS for word in ("--model", model)]
    options = ["--weights", "untrained", "--device", "cpu", "--workers", "1"]
    env = {"GATEWAY_RATE": "0", "GATEWAY_GRPC_PORT": str(grpc)}
    gateway = ["--gateway", f"--gateway-port={port}"]
    folder = tmp_path_factory.mktemp("us")
    with serving(folder, *models, *options, *gateway, env=env):
        yield Addresses(f"http://127.0.0.1:{port}", f"127.0.0.1:{grpc}")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("model", MODELS)
def test_nothing_fails(us: Addresses, model: str) -> None:
    subject = examine(us.url, model, grpc=us.grpc, images=())
    results = list(run(subject))
    failed = [
        f"{each.protocol}, {each.name}: {each.seen}" for each in results if each.outcome == FAIL
    ]
    assert not failed
    untested = Counter(each.seen for each in results if each.outcome == NOT_OFFERED)
    assert untested == UNTESTED
    assert {each.client.rpartition(" ")[0] for each in results} == {
        "buf curl",
        "kserve",
        "requests",
        "schemathesis",
        "tritonclient.grpc",
        "tritonclient.http",
        "this",  # the kit's own: the same result by each way
    }
