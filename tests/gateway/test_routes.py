"""Every route and what it answers, in front of the real TorchServe."""

import requests

from tests.gateway.conftest import Served
from tests.server.colours import encoded


def test_first(gateway: Served) -> None:
    answer = requests.post(f"{gateway.url}/predict?top_k=1", data=encoded("red"), timeout=30)
    assert answer.json()["predictions"][0]["class"] == "red", answer.text
    assert answer.headers["X-Model-Version"] == "1.0"
    print(gateway.server.text())
