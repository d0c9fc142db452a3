"""POST /feedback, in front of a stand-in for TorchServe that says what it is told to."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from uuid import uuid4

import pytest
import requests

from tests.gateway.clients import TIMEOUT, check_error
from tests.gateway.running import Gateway, running, variables
from tests.gateway.test_keys import KEYS, key_line
from tests.processes import wait_for

LABELS = ["red", "green", "crane", "crane", 'a "big" \\ one']


@dataclass
class TorchServe:
    """Predicts what `best` says, and tells its labels to whoever asks for all classes."""

    best: str = "0"  # of the images, as the handler has it in the header
    asked: list[dict[str, str]] = field(default_factory=list)  # headers of clients' predictions
    address: str = ""

    def answer(self, path: str, headers: dict[str, str]) -> tuple[Any, dict[str, str]]:
        """A body and its headers."""
        if path.startswith("/models/"):
            state = {"modelVersion": "1.0", "workers": [{"status": "READY"}]}
            about = {"model": "mobilenet_v2", "classes": len(LABELS)}
            return [state | ({"customizedMetadata": about} if "customized" in path else {})], {}
        # The gateway itself asks whether it lives, and for the labels, whenever it likes.
        if path != "/ping" and "x-probe" not in headers:
            self.asked.append(headers)
        version = path.partition("?")[0].split("/")[-1]
        found = {"x-request-id": str(uuid4()), "X-Model-Version": version}
        if headers.get("x-best-classes") == "1":
            found["X-Best-Classes"] = self.best
        # Best first, so that positions say nothing.
        order = range(len(LABELS))[::-1][: int(headers.get("x-top-k", 5))]
        predictions = [{"class": LABELS[i], "class_id": i, "confidence": 0.1} for i in order]
        return {"status": "success", "predictions": predictions}, found


@contextmanager
def torchserve() -> Iterator[TorchServe]:
    """The real server of `TorchServe`."""
    state = TorchServe()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            given = {name.lower(): value for name, value in self.headers.items()}
            content, headers = state.answer(self.path, given)
            body = json.dumps(content).encode()
            self.send_response(200)
            for name, value in (headers | {"Content-Type": "application/json"}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815 - the name is http.server's

        def log_message(self, *args: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        state.address = f"127.0.0.1:{server.server_address[1]}"
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()


@dataclass
class Service:
    gateway: Gateway
    torchserve: TorchServe

    def predict(self, best: str = "0", version: str = "1.0", **headers: str) -> str:
        """The id of an answer with these best classes."""
        self.torchserve.best = best
        url = f"{self.gateway.url}/predictions/mobilenet_v2/{version}"
        answer = requests.post(url, data=b"image", headers=headers, timeout=TIMEOUT)
        assert answer.status_code == 200, answer.text
        return answer.headers["X-Request-ID"]

    def judge(self, request_id: object, key: str = "", **fields: object) -> requests.Response:
        return self.send(json.dumps({"request_id": request_id} | fields), key)

    def send(self, body: str | bytes, key: str = "") -> requests.Response:
        headers = {"X-API-Key": key} if key else {}
        url = f"{self.gateway.url}/feedback"
        return requests.post(url, data=body, headers=headers, timeout=TIMEOUT)

    def series(self) -> dict[str, int]:
        """The counts of /metrics, by series."""
        text = requests.get(f"{self.gateway.url}/metrics", timeout=TIMEOUT).text
        found = re.findall(r"^(gateway_feedback\S*\{.*\}) (\d+)$", text, re.MULTILINE)
        return {name: int(value) for name, value in found}

    def totals(self) -> tuple[int, int]:
        """How many were correct and wrong."""
        name = 'gateway_feedback_total{{model="mobilenet_v2",version="1.0",correct="{}"}}'
        series = self.series()
        return series[name.format("true")], series[name.format("false")]


@contextmanager
def in_front(folder: Path, **settings: str) -> Iterator[Service]:
    with torchserve() as behind:
        places = {"upstreams": behind.address, "management": behind.address}
        options = {"feedback_requests": "1000", "rate": "0"} | places | settings
        with running(folder, variables(**options)) as gateway:
            yield Service(gateway, behind)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with in_front(tmp_path_factory.mktemp("feedback")) as service:
        yield service


def change(service: Service, before: dict[str, int]) -> dict[str, int]:
    """What was counted since."""
    after = service.series()
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    return {name: value for name, value in grown.items() if value}


def test_judgements_are_counted_by_class_and_version(service: Service) -> None:
    right, wrong, named = service.predict("0"), service.predict("1"), service.predict("4")
    before = service.series()
    answer = service.judge(right, class_id=0)
    assert answer.status_code == 200, answer.text
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.json() == {
        "status": "success",
        "model": "mobilenet_v2",
        "version": "1.0",
        "predicted": {"class": "red", "class_id": 0},
        "actual": {"class": "red", "class_id": 0},
        "correct": True,
    }
    assert service.judge(wrong, **{"class": "red"}).json()["correct"] is False
    assert service.judge(named, **{"class": LABELS[4]}).json()["correct"] is True
    version = 'model="mobilenet_v2",version="1.0"'
    by_class = "gateway_feedback_class_total"
    assert change(service, before) == {
        f'gateway_feedback_total{{{version},correct="true"}}': 2,
        f'gateway_feedback_total{{{version},correct="false"}}': 1,
        f'{by_class}{{{version},class_id="0",class="red",correct="true"}}': 1,
        f'{by_class}{{{version},class_id="0",class="red",correct="false"}}': 1,
        f'{by_class}{{{version},class_id="4",class="a \\"big\\" \\\\ one",correct="true"}}': 1,
    }


def test_the_totals_of_a_version_begin_at_0(tmp_path: Path) -> None:
    with in_front(tmp_path) as service:
        assert service.series() == {}
        service.predict()
        assert service.totals() == (0, 0)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/explanations/mobilenet_v2/1.0", b"image"),
        ("/v1/models/mobilenet_v2:explain", b'{"instances": ["aW1hZ2U="]}'),
    ],
)
def test_an_explained_answer_can_be_judged(service: Service, path: str, body: bytes) -> None:
    service.torchserve.best = "0"
    answer = requests.post(service.gateway.url + path, data=body, timeout=TIMEOUT)
    assert answer.status_code == 200, answer.text
    assert service.torchserve.asked[-1]["x-explain"] == "true"
    assert service.judge(answer.headers["X-Request-ID"], class_id=0).json()["correct"] is True


def test_an_answer_is_judged_once(service: Service) -> None:
    request_id = service.predict("0")
    before = service.series()
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: service.judge(request_id, class_id=0), range(48)))
    assert sorted(answer.status_code for answer in answers) == [200] + [409] * 47
    check_error(next(a for a in answers if a.status_code == 409), 409, "Conflict")
    assert sum(change(service, before).values()) == 2  # the total, and that of the class


def test_each_image_of_a_request_is_judged_by_its_index(service: Service) -> None:
    request_id = service.predict("0,-,1")
    refusals: list[tuple[dict[str, Any], str]] = [
        ({}, "3 images"),
        ({"image": 3}, "0 to 2"),
        ({"image": 1}, "not classified"),
    ]
    for which, message in refusals:
        refused = service.judge(request_id, class_id=0, **which)
        check_error(refused, 400)
        assert message in refused.json()["message"]
    assert service.judge(request_id, class_id=1, image=2).json()["correct"] is True
    assert service.judge(request_id, class_id=1, image=0).json()["correct"] is False
    assert service.judge(request_id, class_id=1, image=0).status_code == 409


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"class_id": 5}, "class_id must be 0 to 4"),
        ({"class_id": 1e300}, "class_id must be 0 to 4"),
        ({"class_id": -1}, "a whole number from 0"),
        ({"class_id": 0.5}, "a whole number from 0"),
        ({"class_id": "0"}, "a whole number from 0"),
        ({"class": "blue"}, "no class of this name"),
        ({"class": "crane"}, "several classes have this name; give class_id: 2 or 3"),
        ({"class": 3}, "a text"),
        ({"class": None}, "a text"),
        ({"class": "red", "class_id": 0}, "either class or class_id"),
        ({}, "either class or class_id"),
        ({"class_id": 0, "image": "0"}, "image must be the index"),
        ({"class_id": 0, "image": 1}, "image must be 0 to 0"),
        ({"class_id": 0, "comment": "x"}, "there is another one"),
    ],
)
def test_what_makes_no_sense_is_refused(
    service: Service, fields: dict[str, Any], message: str
) -> None:
    request_id = service.predict()
    before = service.series()
    refused = service.judge(request_id, **fields)
    check_error(refused, 400)
    assert message in refused.json()["message"]
    assert change(service, before) == {}
    assert service.judge(request_id, class_id=2).status_code == 200, "it can still be judged"


@pytest.mark.parametrize("body", [b"", b"no json", b"null", b"3", b"[]", b"[1]", b'{"class_id":0}'])
def test_other_bodies_are_refused(service: Service, body: bytes) -> None:
    check_error(service.send(body), 400)


def test_unknown_ids_are_told_apart_from_paths_that_are_not_there(service: Service) -> None:
    refused = service.judge(str(uuid4()), class_id=0)
    check_error(refused, 404)
    assert "no answer of this id is remembered" in refused.json()["message"]
    locked = service.judge(f"{service.predict()} is judged", class_id=0)
    check_error(locked, 400)


def test_it_is_under_the_limits_of_the_gateway(service: Service, tmp_path: Path) -> None:
    url = f"{service.gateway.url}/feedback"
    for method in ("GET", "PUT", "DELETE"):
        refused = requests.request(method, url, timeout=TIMEOUT)
        check_error(refused, 405)
        assert refused.headers["Allow"] == "POST"
    for body in (bytes(4097), iter([bytes(4000)] * 2)):  # the second in chunks
        refused = service.send(body)  # type: ignore[arg-type]
        check_error(refused, 413)
        assert "4096 bytes" in refused.json()["message"]
    with in_front(tmp_path, rate="1", burst="2") as other:
        statuses = [other.send(b"{}").status_code for _ in range(8)]
    assert set(statuses) == {400, 429}


def test_it_is_off_by_default(tmp_path: Path) -> None:
    with in_front(tmp_path, feedback_requests="0") as service:
        request_id = service.predict(**{"X-Best-Classes": "1"})
        refused = service.judge(request_id, class_id=0)
        check_error(refused, 404)
        assert "GATEWAY_FEEDBACK_REQUESTS" in refused.json()["message"]
        assert service.series() == {}
        assert not any("x-best-classes" in headers for headers in service.torchserve.asked)


def test_clients_neither_send_nor_see_the_header(service: Service) -> None:
    service.torchserve.asked.clear()
    url = f"{service.gateway.url}/predictions/mobilenet_v2/1.0"
    headers = {"X-Best-Classes": "4", "X-Probe": "1"}
    answer = requests.post(url, data=b"image", headers=headers, timeout=TIMEOUT)
    assert "X-Best-Classes" not in answer.headers
    assert [asked["x-best-classes"] for asked in service.torchserve.asked] == ["1"]


def test_only_the_client_that_asked_may_judge(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(key_line("alice") + key_line("bob"))
    with in_front(tmp_path, keys=str(file)) as service:
        request_id = service.predict(**{"X-API-Key": KEYS["alice"]})
        check_error(service.judge(request_id, class_id=0), 401)
        others = service.judge(request_id, KEYS["bob"], class_id=0)
        check_error(others, 404)
        unknown = service.judge(str(uuid4()), KEYS["bob"], class_id=0)
        assert others.json() == unknown.json()
        assert service.judge(request_id, KEYS["alice"], class_id=0).status_code == 200
        file.write_text(file.read_text() + key_line("carol"))  # nginx reads its configuration anew
        wait_for(
            lambda: service.judge(request_id, KEYS["carol"], class_id=0).status_code == 404, 20
        )
        # An answer from before the reload is remembered, and so is that it was judged.
        assert service.judge(request_id, KEYS["alice"], class_id=0).status_code == 409


def test_the_oldest_answers_are_forgotten(tmp_path: Path) -> None:
    with in_front(tmp_path, feedback_requests="1") as service, ThreadPoolExecutor(4) as pool:
        first = service.predict()
        # There is room for a few hundred, whatever the setting says.
        ids = list(pool.map(lambda _: service.predict(), range(600)))
        assert service.judge(first, class_id=0).status_code == 404
        assert service.judge(ids[-1], class_id=0).status_code == 200


def test_classes_take_a_bounded_part_of_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond it only the totals count; nothing that was counted is lost."""
    monkeypatch.setattr(f"{__name__}.LABELS", [str(i) + "x" * 1000 for i in range(10)])
    with in_front(tmp_path) as service, ThreadPoolExecutor(4) as pool:

        def judge(number: int) -> int:
            """The ten classes of a version."""
            request_id = service.predict(",".join("0123456789"), version=f"1.{number}")
            found = [service.judge(request_id, class_id=i, image=i) for i in range(10)]
            return sum(answer.status_code == 200 for answer in found)

        assert sum(pool.map(judge, range(120))) == 1200
        series = service.series()
    classes = [value for name, value in series.items() if "class_total" in name]
    assert 500 < len(classes) < 1200
    assert set(classes) == {1}
    assert sum(series.values()) - sum(classes) == 1200
