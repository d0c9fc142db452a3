"""Every request form, answer and error of the documented API, against the real server."""

import base64
import json
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from handler.openvino_engine import has_bf16
from tests import ROOT
from tests.drawing import announced, turned
from tests.server.colours import LABELS, encoded, picture
from tests.server.serving import Server

TIMEOUT = 30


def post(server: Server, **kwargs: Any) -> requests.Response:
    return requests.post(server.predictions, timeout=TIMEOUT, **kwargs)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def best(answer: dict[str, Any]) -> str:
    return answer["predictions"][0]["class"]


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_every_format_is_classified(server: Server, label: str, format: str) -> None:
    response = post(server, data=encoded(label, format))
    assert response.status_code == 200
    assert best(response.json()) == label


@pytest.mark.parametrize("content_type", [None, "image/jpeg", "application/octet-stream", "text/x"])
def test_raw_body_of_any_content_type(server: Server, content_type: str | None) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    assert best(post(server, data=encoded("green"), headers=headers).json()) == "green"


def test_answer_has_the_documented_form(server: Server) -> None:
    response = post(server, data=encoded("blue", size=(200, 100)))
    answer = response.json()
    assert response.headers["content-type"] == "application/json"
    assert list(answer) == ["status", "predictions", "metadata"]
    assert answer["status"] == "success"
    assert best(answer) == "blue"
    assert answer["predictions"][0]["class_id"] == 2
    confidences = [prediction["confidence"] for prediction in answer["predictions"]]
    assert confidences == sorted(confidences, reverse=True)
    assert sum(confidences) == pytest.approx(1, abs=1e-4)
    metadata = answer["metadata"]
    assert 0 < metadata.pop("inference_time") < 10
    assert metadata.pop("request_id") == response.headers["x-request-id"]
    assert metadata == {
        "filename": None,
        "model": "mobilenet_v2",
        "version": "1.0",
        "weights": "colours.pth",
        "device": "cpu",
        "engine": "openvino-bf16" if has_bf16() else "openvino-fp32",  # what `auto` takes
        "image_size": [200, 100],
        "decode": "exact",
        "cached": False,
        "calibrated": False,
    }


@pytest.mark.parametrize("part", ["file", "image", "data", "body", "file1"])
def test_multipart(server: Server, part: str) -> None:
    response = post(
        server,
        files={part: ("x.jpg", encoded("red"), "image/jpeg")},
        data={"top_k": "2", "filename": "röd.jpg"},
    )
    answer = response.json()
    assert [best(answer), len(answer["predictions"])] == ["red", 2]
    assert answer["metadata"]["filename"] == "röd.jpg"


def test_several_parts_are_answered_in_order(server: Server) -> None:
    files = {f"file{i}": encoded(label) for i, label in enumerate(("blue", "red", "green"), 1)}
    answer = post(server, files=files).json()
    assert answer["status"] == "success"
    assert [best(result) for result in answer["results"]] == ["blue", "red", "green"]


def forward(server: Server, body: bytes, content_type: str) -> requests.Response:
    """A body as the gateway sends it."""
    headers = {"Content-Type": "application/octet-stream", "X-Body-Type": content_type}
    return post(server, data=body, headers=headers)


@pytest.mark.parametrize("by", ["torchserve", "handler"])
def test_files_of_one_name_are_answered_in_order(server: Server, by: str) -> None:
    """TorchServe takes a form apart, or the handler does if the gateway hands it over whole."""
    labels = ("blue", "red", "green", "red")
    names = ("file", "file", "image", "file")
    files = [
        (name, (f"{label}.jpg", encoded(label), "image/jpeg"))
        for name, label in zip(names, labels, strict=True)
    ]
    form = requests.Request("POST", server.url, files=files, data={"top_k": "2"}).prepare()
    assert isinstance(form.body, bytes)
    if by == "torchserve":
        response = post(server, data=form.body, headers=dict(form.headers))
    else:
        response = forward(server, form.body, form.headers["Content-Type"])
    results = response.json()["results"]
    assert [best(result) for result in results] == list(labels)
    assert [len(result["predictions"]) for result in results] == [2] * 4
    known = [f"{label}.jpg" if by == "handler" else None for label in labels]
    assert [result["metadata"]["filename"] for result in results] == known


def test_a_form_that_torchserve_leaves_to_the_handler(server: Server, tmp_path: Path) -> None:
    """docs/api.md: the same command with one header more."""
    labels = ("green", "blue", "red")
    for label in labels:
        (tmp_path / label).write_bytes(encoded(label))
    command = ["curl", "-sS", "--noproxy", "*", server.predictions, "-F", "top_k=2"]
    command += ["-H", "Content-Type: multipart/mixed"]
    command += [word for label in labels for word in ("-F", f"file=@{label}")]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True, timeout=TIMEOUT)
    results = json.loads(answer.stdout)["results"]
    assert [best(result) for result in results] == list(labels)
    assert [len(result["predictions"]) for result in results] == [2] * 3
    # TorchServe itself does not pass on the names of files.
    assert [result["metadata"]["filename"] for result in results] == list(labels)


@pytest.mark.parametrize("command", ["predict", "benchmark"])
def test_our_clients_send_it(server: Server, tmp_path: Path, command: str) -> None:
    for label in LABELS:
        (tmp_path / f"{label}.jpg").write_bytes(encoded(label))
    if command == "predict":
        words = ["--top-k", "2", "--json", *(str(tmp_path / f"{label}.jpg") for label in LABELS)]
    else:
        words = ["--images", str(tmp_path), "--concurrency", "1", "--seconds", "0.5"]
        words += ["--warmup-seconds", "0.1", "--per-request", str(len(LABELS))]
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / f"{command}.py", "--url", server.url, *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if command == "predict":
        assert [best(line) for line in lines] == list(LABELS)
        assert [line["metadata"]["filename"] for line in lines] == [f"{x}.jpg" for x in LABELS]
        assert {len(line["predictions"]) for line in lines} == {2}
    else:
        (report,) = lines
        assert report["per_request"] == len(LABELS)
        (run,) = report["measurements"]
        assert (run["failed"], run["refused"]) == (0, 0)
        # each answer has a result for every image
        assert run["received_bytes"] / run["requests"] > 100 * len(LABELS)


def test_curls_list_of_files(server: Server, tmp_path: Path) -> None:
    """-F file=@a,b is one part that is itself a form."""
    for label in ("green", "blue"):
        (tmp_path / label).write_bytes(encoded(label))
    command = ["curl", "-sS", "--noproxy", "*", server.predictions, "-F", "file=@green,blue"]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True, timeout=TIMEOUT)
    results = json.loads(answer.stdout)["results"]
    assert [best(result) for result in results] == ["green", "blue"]


@pytest.mark.parametrize(
    ("header", "between", "encode"),
    [
        ("Content-Transfer-Encoding: base64", " ", base64.encodebytes),
        ("Content-Type: image/jpeg; charset=binary", " ", bytes),
        ("Content-Type: image/jpeg", "\r\n ", bytes),
    ],
)
def test_forms_that_torchserve_cannot_read(
    server: Server, header: str, between: str, encode: Callable[[bytes], bytes]
) -> None:
    """Sent to it as forms they are a 500 each, and their bytes stay in Java's memory."""
    head = f'Content-Disposition: form-data; name="file";{between}filename="röd.jpg"\r\n{header}'
    body = f"--x\r\n{head}\r\n\r\n".encode() + encode(encoded("red")) + b"\r\n--x--"
    content_type = "multipart/form-data; boundary=x"
    assert post(server, data=body, headers={"Content-Type": content_type}).status_code == 500
    answer = forward(server, body, content_type).json()
    assert (best(answer), answer["metadata"]["filename"]) == ("red", "röd.jpg")


def test_other_bodies_from_the_gateway(server: Server) -> None:
    document = json.dumps({"image": b64(encoded("green")), "top_k": 1}).encode()
    answer = forward(server, document, "application/json; charset=utf-8").json()
    assert [best(answer), len(answer["predictions"])] == ["green", 1]
    assert best(forward(server, encoded("blue"), "image/jpeg").json()) == "blue"
    assert forward(server, b"a=b", "application/x-www-form-urlencoded").status_code == 400


def test_form_that_was_cut_off(server: Server) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\n' + encoded("red")
    response = forward(server, body, "multipart/form-data; boundary=x")
    assert (response.status_code, response.json()["type"]) == (400, "MalformedRequest")
    assert "truncated" in response.json()["message"]


def test_form_without_a_boundary(server: Server) -> None:
    headers = {"Content-Type": "multipart/form-data"}
    response = post(server, data=b"--x\r\n", headers=headers)
    assert (response.status_code, response.json()["type"]) == (400, "MalformedRequest")
    assert "multipart without a boundary" in response.json()["message"]


def test_json_image(server: Server) -> None:
    answer = post(server, json={"image": b64(encoded("green")), "top_k": 1}).json()
    assert [best(answer), len(answer["predictions"])] == ["green", 1]


def test_json_data_url_and_filename(server: Server) -> None:
    url = "data:image/png;base64," + b64(encoded("red", "PNG"))
    answer = post(server, json={"image": url, "filename": "a.png"}).json()
    assert (best(answer), answer["metadata"]["filename"]) == ("red", "a.png")


def test_json_list_with_a_bad_image_is_partial(server: Server) -> None:
    images = [b64(encoded("red")), "no base64!", b64(b"no image"), b64(encoded("blue"))]
    response = post(server, json={"images": images})
    answer = response.json()
    assert (response.status_code, answer["status"]) == (200, "partial")
    red, no_base64, no_image, blue = answer["results"]
    assert (best(red), best(blue)) == ("red", "blue")
    assert (no_base64["type"], no_image["type"]) == ("InvalidBase64", "UnreadableImage")


def test_json_list_without_a_good_image_is_an_error(server: Server) -> None:
    response = post(server, json={"images": [b64(b"no image"), b64(b"%PDF-1.7")]})
    assert response.status_code == 415
    assert response.json()["status"] == "error"


def test_top_k_of_the_header(server: Server) -> None:
    answer = post(server, data=encoded("red"), headers={"X-Top-K": "1"}).json()
    assert len(answer["predictions"]) == 1


def test_top_k_of_the_query(server: Server) -> None:
    for body in ({"data": encoded("red")}, {"files": {"file": encoded("red")}}):
        url = f"{server.url}/{server.model}/predict?top_k=2"
        answer = requests.post(url, timeout=TIMEOUT, **body).json()
        assert [best(answer), len(answer["predictions"])] == ["red", 2]


def test_version_in_the_path(server: Server) -> None:
    response = requests.post(f"{server.predictions}/1.0", data=encoded("green"), timeout=TIMEOUT)
    assert best(response.json()) == "green"


def test_exif_orientation_is_applied(server: Server) -> None:
    """100 pixels wide and 300 high, and stored the other way round."""
    answer = post(server, data=turned(picture("red", (100, 300)), 6, "JPEG")).json()
    assert answer["metadata"]["image_size"] == [100, 300]
    assert best(answer) == "red"


RED = encoded("red")
HUGE = announced("PNG", 20_000, 20_000)
AS_JSON = {"Content-Type": "application/json"}
AS_FORM = {"Content-Type": "multipart/form-data; boundary=x"}
# Of each kind one: tests/unit/handler has the others.
BAD_REQUESTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "empty": ({"data": b""}, 400, "NoImage"),
    "truncated": ({"data": RED[:-200]}, 400, "UnreadableImage"),
    "HTML": ({"data": b"<!DOCTYPE html><html><body>no"}, 415, "UnsupportedFormat"),
    "too many pixels": ({"data": HUGE}, 413, "TooManyPixels"),
    "too many bytes": ({"data": bytes(10 * 2**20 + 1)}, 413, "ImageTooLarge"),
    "too many images": ({"json": {"images": ["YQ=="] * 33}}, 413, "TooManyImages"),
    "top_k": ({"data": RED, "headers": {"X-Top-K": "0"}}, 400, "InvalidTopK"),
    "top_k of a form": ({"data": {"top_k": "4"}, "files": {"file": RED}}, 400, "InvalidTopK"),
    "broken JSON": ({"data": b'{"image": ', "headers": AS_JSON}, 400, "MalformedRequest"),
    "URL": ({"json": {"image": "http://127.0.0.1/cat.jpg"}}, 400, "InvalidBase64"),
    "unknown part": ({"files": {"picture": RED}}, 400, "MalformedRequest"),
    "broken multipart": ({"data": b"--x\r\n", "headers": AS_FORM}, 400, "MalformedRequest"),
    "web form": ({"data": {"image": "abc"}}, 400, "MalformedRequest"),
}


@pytest.mark.parametrize("kind", BAD_REQUESTS)
def test_bad_request(server: Server, kind: str) -> None:
    request, status, type_name = BAD_REQUESTS[kind]
    response = post(server, **request)
    assert response.headers["content-type"] == "application/json"
    assert response.json() == {
        "status": "error",
        "code": status,
        "type": type_name,
        "message": response.json()["message"],
    }
    assert not re.search(r"/work|/tmp|\b0x|Traceback|\.py", response.json()["message"])
    assert response.status_code == status


def test_a_body_above_the_frontends_limit_is_refused(server: Server) -> None:
    assert post(server, data=bytes(17 * 2**20)).status_code == 413


def test_a_client_cannot_pass_for_a_describe_request(server: Server) -> None:
    response = post(server, data=encoded("red"), headers={"describe": "True"})
    assert best(response.json()) == "red"


def test_a_client_gets_no_info_with_a_broken_form(server: Server) -> None:
    response = post(server, data=b"--x", headers={"describe": "True", **AS_FORM})
    assert (response.status_code, response.json()["type"]) == (400, "MalformedRequest")


def test_torchserves_own_path_explains(server: Server) -> None:
    url = f"{server.url}/explanations/{server.model}"
    answer = requests.post(url, data=encoded("red"), timeout=TIMEOUT).json()
    assert (answer["explanation"]["class"], answer["explanation"]["method"]) == ("red", "cam")


def test_unknown_model_is_404(server: Server) -> None:
    url = f"{server.url}/predictions/unknown"
    assert requests.post(url, data=encoded("red"), timeout=TIMEOUT).status_code == 404


def test_concurrent_good_and_bad_requests(server: Server) -> None:
    """64 at once, a quarter of them garbage: each gets its own answer, and no worker restarts."""
    before = server.worker_pids()
    garbage = [(b"not an image", 400), (b"%PDF-1.7", 415), (HUGE, 413), (RED[:-200], 400)]
    jobs: list[tuple[bytes, int | str]] = []
    for i in range(16):
        jobs += [(encoded(LABELS[(i + j) % 3]), LABELS[(i + j) % 3]) for j in range(3)]
        jobs.append(garbage[i % len(garbage)])

    def ask(job: tuple[bytes, int | str]) -> str:
        """A label is that of an answer, a number the code of an error; gives the request's id."""
        body, expected = job
        response = post(server, data=body)
        answer = response.json()
        assert expected == (best(answer) if "predictions" in answer else answer["code"])
        return str(response.headers["x-request-id"])

    with ThreadPoolExecutor(64) as pool:
        lines = server.request_lines(set(pool.map(ask, jobs)))
    assert len(lines) == 64
    assert server.worker_pids() == before
    assert max(line["batch"] for line in lines) > 1, "no batch formed, so none was tested"
    mixed = [line for line in lines if line["batch"] > 1 and line["status"] != 200]
    assert mixed, "no refused request shared a batch with others"
