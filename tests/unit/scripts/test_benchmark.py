"""./scripts/benchmark, the command."""

import json
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from scripts.benchmark import main
from tests.unit.conftest import Web


def test_a_folder_without_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--images", str(tmp_path)]) == 2
    assert "has no .jpg" in capsys.readouterr().err


def test_the_command_ends_with_one_json_line(
    web: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that refuses all is busy, and can be measured."""
    web.answers["/predictions/mobilenet_v2"] = web.text("{}", 503)
    plot = tmp_path / "plot.png"
    times = ["--seconds", "0.1", "--warmup-seconds", "0.05"]
    argv = ["--url", web.url, "--concurrency", "1", "--rate", "20", *times, "--plot", str(plot)]
    assert main(argv) == 1  # nothing was answered
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:2] == ["1", "client"]
    last = json.loads(lines[-1])
    assert last["url"] == f"{web.url}/predictions/mobilenet_v2"
    assert [m["concurrency"] for m in last["measurements"]] == [1, 0]
    assert last["machine"]["cores"] >= 1
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_nobody_answers(closed_port: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", f"http://127.0.0.1:{closed_port}"]) == 2
    done = capsys.readouterr()
    url = f"http://127.0.0.1:{closed_port}/predictions/mobilenet_v2"
    assert done.err == f"error: {url} does not answer: is ./scripts/serve running?\n"
    assert done.out == ""


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (
            404,
            '{"type": "ModelNotFoundException", "message": "no m"}',
            "ModelNotFoundException: no m",
        ),
        (302, "<html>", "NoAnswer: HTTP 302"),
    ],
)
def test_a_server_that_fails_is_asked_once(
    web: Web, capsys: pytest.CaptureFixture[str], status: int, body: str, message: str
) -> None:
    web.answers["/predictions/m"] = web.text(body, status)
    assert main(["--url", web.url, "--model", "m"]) == 2
    assert capsys.readouterr() == ("", f"error: {web.url}/predictions/m: {message}\n")
    assert web.asked == ["/predictions/m"]


def test_a_key_in_a_file(web: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = tmp_path / "key"
    key.write_text("s3cret\n")

    def answer(request: BaseHTTPRequestHandler) -> None:
        said = {"type": "Key", "message": f"of {request.headers['X-API-Key']}"}
        web.text(json.dumps(said), 401)(request)

    web.answers["/predict"] = answer
    assert main(["--url", f"{web.url}/predict", "--key-file", str(key)]) == 2
    assert "Key: of s3cret" in capsys.readouterr().err
    key.write_text("two words")
    assert main(["--url", f"{web.url}/predict", "--key-file", str(key)]) == 2
    assert "must have one key" in capsys.readouterr().err
