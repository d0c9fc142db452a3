"""The client of TorchServe's management port."""

import json

import pytest
import requests

from service.torchserve.management import Management, UnknownModel
from tests.unit.conftest import Web
from tests.unit.service.described import described

JSON = "application/json"


@pytest.fixture
def client(web: Web) -> Management:
    return Management(web.url)


def test_a_model_and_its_workers(web: Web, client: Management) -> None:
    state = described("READY", "UNLOADING", expected=3)
    web.answers["/models/birds"] = web.text(json.dumps(state), content_type=JSON)
    birds = client.describe("birds")
    assert (birds.version, birds.min_workers, birds.ready, birds.remaining) == ("1.0", 3, 1, 100)
    assert [(worker.id, worker.is_ready) for worker in birds.workers] == [
        ("9000", True),
        ("9001", False),
    ]


@pytest.mark.parametrize(
    ("usage", "device"), [("N/A", "cpu"), ("gpuId::1 x", "cuda:1"), ("failed to obtained", "cuda")]
)
def test_device_of_a_worker(web: Web, client: Management, usage: str, device: str) -> None:
    state = described("READY", expected=1, gpu_usage=usage)
    web.answers["/models/birds"] = web.text(json.dumps(state), content_type=JSON)
    assert [worker.device for worker in client.describe("birds").workers] == [device]


def test_what_the_handler_says(web: Web, client: Management) -> None:
    state = described("READY", expected=1)
    state[0]["customizedMetadata"] = {"classes": 3}
    path = "/models/birds/2.0?customized=true"
    web.answers[path] = web.text(json.dumps(state), content_type=JSON)
    assert client.info("birds/2.0") == {"classes": 3}


def test_no_such_model(client: Management) -> None:
    with pytest.raises(UnknownModel, match=f"^{client.url} has no model b%20 \\?$"):
        client.describe("b%20 ?")


@pytest.mark.parametrize("answer", ["[]", "[{}]", '[{"workers": [{}]}]', '{"models": 1}', "3", "<"])
def test_somebody_else_answers(web: Web, client: Management, answer: str) -> None:
    paths = ("/models", "/models/birds", "/models/birds?customized=true")
    web.answers |= dict.fromkeys(paths, web.text(answer))
    for ask in (client.models, lambda: client.describe("birds"), lambda: client.info("birds")):
        with pytest.raises(requests.RequestException):
            ask()
