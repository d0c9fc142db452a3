"""The kit itself: a wrong server passes nothing, and differences between answers are found."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from scripts import conformance
from tests.conformance.checks import FAIL, NOT_OFFERED, PASS, Subject, differences
from tests.conformance.kit import compare, run

OUTPUT = {"datatype": "FP32", "shape": [1, 2], "data": [0.25, 0.75]}


class Yes(BaseHTTPRequestHandler):
    """Answers everything with an empty object."""

    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    do_GET = do_POST = answer  # noqa: N815 the library's names

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def yes() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Yes) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_server_that_says_yes_passes_nothing_but_its_health(yes: str) -> None:
    subject = Subject(
        url=yes,
        model="m",
        version="1",
        inputs=({"name": "image", "datatype": "BYTES", "shape": [-1]},),
        outputs=({"name": "scores", "datatype": "FP32", "shape": [-1, 2]},),
        extensions=("binary_tensor_data", "classification"),
        images=("iVBORw0KGgo=",),
    )
    results = list(run(subject))
    passed = {result.name for result in results if result.outcome == PASS}
    healthy = {"server live", "server ready"}
    assert passed == healthy | {
        f"schema: {name}" for name in (*healthy, "model ready", "version ready")
    }
    untested = {result.seen for result in results if result.outcome == NOT_OFFERED}
    assert untested == {
        "no --grpc HOST:PORT was given",
        "the model's first input has one dimension",
        "the model has one output",
    }
    assert sum(result.outcome == FAIL for result in results) > 70


def test_a_port_that_nobody_listens_on_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert conformance.main(["http://127.0.0.1:9", "m"]) == 2
    assert capsys.readouterr().err.startswith("error: http://127.0.0.1:9/v2: ")


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, []),
        ({"data": [0.25, 0.7500005]}, []),
        ({"data": [0.25, 0.75001]}, ["data of a: [0.25, 0.75] and [0.25, 0.75001]"]),
        ({"data": [0.25]}, ["data of a: [0.25, 0.75] and [0.25]"]),
        ({"datatype": "FP64"}, ["datatype of a: FP32 and FP64"]),
        ({"shape": [2]}, ["shape of a: [1, 2] and [2]"]),
    ],
)
def test_differences(changed: dict[str, object], expected: list[str]) -> None:
    assert differences({"a": OUTPUT}, {"a": OUTPUT | changed}) == expected


def test_answers_to_fewer_images_or_outputs_differ() -> None:
    answers = {
        "V2 REST JSON": [{"a": OUTPUT}, {"a": OUTPUT}],
        "V2 gRPC": [{"a": OUTPUT}],
        "V2 REST binary": [{"a": OUTPUT}, {"b": OUTPUT}],
    }
    found = {result.name: result.seen for result in compare(answers)}
    assert found == {
        "the same result: gRPC": "1 answers to 2 images",
        "the same result: REST binary": "a is missing",
    }
