"""A server of every mood, as ./scripts/scale sees it."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from service.scaling import model, scaling
from service.scaling.model import Model
from service.torchserve.management import Management
from tests.unit.conftest import Web
from tests.unit.service.described import described

JSON = "application/json"


class Server:
    """TorchServe as ./scripts/scale sees it; workers start and stop at once unless told."""

    def __init__(self, web: Web, workers: int = 1) -> None:
        self.web = web
        self.workers = workers
        self.ready: int | None = None  # None: all
        self.gpu_usage = "N/A"
        self.requests = 0.0
        self.coming = 0.0  # requests between two looks
        self.busy_seconds = 0.0  # of a worker, for a request
        self.down: int | None = None  # status of every answer
        self.sizes: list[int] = []
        for number in range(1, 65):
            path = f"/models/birds?min_worker={number}&max_worker={number}"
            web.answers[path] = self._resizing(number)
        web.answers["/models/birds"] = lambda request: self._answer(self.describe())(request)
        web.answers["/metrics"] = lambda request: self._answer(self.metrics(), "text/plain")(
            request
        )
        self.model = Model(Management(web.url), web.url, "birds")

    def _answer(self, content: Any, kind: str = JSON) -> Callable[[Any], None]:
        if self.down:
            return Web.text("starting", self.down)
        return Web.text(content if isinstance(content, str) else json.dumps(content), 200, kind)

    def _resizing(self, number: int) -> Callable[[Any], None]:
        def answer(request: Any) -> None:
            assert request.command == "PUT"
            self.sizes.append(number)
            self.workers = number
            Web.text('{"status": "Processing worker updates..."}', 202, JSON)(request)

        return answer

    def describe(self) -> list[dict[str, Any]]:
        ready = self.workers if self.ready is None else self.ready
        states = ["READY"] * ready + ["UNLOADING"] * (self.workers - ready)
        return described(*states, expected=self.workers, gpu_usage=self.gpu_usage)

    def metrics(self) -> str:
        self.requests += self.coming
        torchserve = '{model_name="birds",model_version="default",hostname="h",}'
        ours = 'model="birds",version="1.0",Hostname="h"'
        return (
            f"ts_inference_requests_total{torchserve} {self.requests}\n"
            f"ts_queue_latency_microseconds{torchserve} 0.0\n"
            f"ts_inference_latency_microseconds{torchserve} {self.requests * 1000}\n"
            f'classifier_requests_total{{{ours},status="200",}} {self.requests}\n'
            f'classifier_probes_total{{{ours},status="200",}} 0.0\n'
            "classifier_worker_busy_seconds_total"
            f'{{{ours},worker="0",}} {self.requests * self.busy_seconds}\n'
        )


@pytest.fixture
def server(web: Web, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setattr(scaling, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(scaling, "QUIET_SECONDS", 0.2)
    monkeypatch.setattr(model, "QUIET_SECONDS", (0.01, 0.02))
    return Server(web)
