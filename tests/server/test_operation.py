"""What operators use: scaling, health, info, metrics, logs, and the scripts around them."""

import json
import re
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from handler.openvino_engine import has_bf16
from tests import ROOT
from tests.processes import wait_for
from tests.server.colours import LABELS, encoded
from tests.server.serving import Server

OURS = ("classifier_requests", "classifier_image")
SAMPLE = re.compile(r"^(?P<name>\w+)\{(?P<labels>[^}]*)\} (?P<value>\S+)$")


def scrape(server: Server) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    text = requests.get(f"{server.metrics}/metrics", timeout=10).text
    samples = {}
    for line in text.splitlines():
        if match := SAMPLE.match(line):
            labels = re.findall(r'(\w+)="([^"]*)"', match["labels"])
            kept = frozenset((key, value) for key, value in labels if key.lower() != "hostname")
            samples[match["name"], kept] = float(match["value"])
    return samples


def settled(server: Server) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Samples once nothing is under way: a worker hands its counts over once a second."""
    seen = [scrape(server)]

    def is_settled() -> bool:
        time.sleep(2.5)
        seen.append(scrape(server))
        before, after = seen[-2:]
        ours = [name for name in after if name[0].startswith(OURS)]
        return all(before.get(name) == after[name] for name in ours)

    wait_for(is_settled, 30)
    return seen[-1]


def value(samples: dict[Any, float], name: str, **labels: str) -> float:
    labels = {"model": "mobilenet_v2", "version": "1.0"} | labels
    return samples.get((name, frozenset(labels.items())), 0)


def run(script: str, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / script), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_workers_scale_up_and_down_under_load(server: Server) -> None:
    """Scaling up loses nothing; scaling down cuts what the removed worker has in hand, with 500."""
    clients = 4
    stop = False
    statuses: list[int] = []

    def load() -> None:
        with requests.Session() as session:
            while not stop:
                response = session.post(server.predictions, data=encoded("green"), timeout=10)
                statuses.append(response.status_code)

    def scale(workers: int) -> list[int]:
        """The statuses of the requests answered until there are so many workers READY."""
        start = len(statuses)
        url = f"{server.management}/models/{server.model}?min_worker={workers}"
        assert requests.put(url, timeout=10).status_code == 202
        wait_for(lambda: server.statuses() == ["READY"] * workers)
        time.sleep(1)  # what was in hand has been answered
        return statuses[start:]

    with ThreadPoolExecutor(clients) as pool:
        jobs = [pool.submit(load) for _ in range(clients)]
        try:
            assert set(scale(3)) == {200}
            assert run("healthcheck.py", *addresses(server)).returncode == 0
            down = scale(1)
            assert set(down) <= {200, 500}
            assert down.count(500) <= clients, "each client has one request under way"
            assert set(scale(2)) == {200}
        finally:
            stop = True
        for job in jobs:
            job.result()
    assert len(server.worker_pids()) == 2


def test_models_cannot_be_registered_or_removed(server: Server) -> None:
    url = f"{server.management}/models"
    assert requests.post(f"{url}?url=x.mar", timeout=10).status_code == 405
    assert requests.delete(f"{url}/{server.model}", timeout=10).status_code == 405


def test_no_workflow_can_be_registered(server: Server, tmp_path: Path) -> None:
    """POST /workflows would run the handler of an archive, and has no switch of its own."""
    archive = tmp_path / "evil.war"
    proof = tmp_path / "proof"
    with zipfile.ZipFile(archive, "w") as war:
        manifest = {"createdOn": "", "archiverVersion": "0.2.15", "workflow": {}}
        manifest["workflow"] = {"workflowName": "evil", "specFile": "s.yaml", "handler": "h.py"}
        war.writestr("WAR-INF/MANIFEST.json", json.dumps(manifest))
        war.writestr("s.yaml", "models: {}\ndag: {f: []}\n")
        war.writestr("h.py", f"open({str(proof)!r}, 'w')\ndef f(data, context): return data\n")
    for url in (f"file://{archive}", str(archive), "evil.war", "file://127.0.0.1/evil.war"):
        response = requests.post(f"{server.management}/workflows?url={url}", timeout=30)
        assert response.status_code >= 400, (url, response.text)
    assert not proof.exists()
    assert requests.get(f"{server.management}/workflows", timeout=10).json()["workflows"] == []


def test_info(server: Server) -> None:
    info = server.info()
    assert info["architecture"] == "mobilenet_v2"
    assert info["parameters"] == {"total": 2227715, "trainable": 2227715}
    assert info["classes"] == 3
    assert info["input_size"] == [3, 224, 224]
    assert info["transforms"]["resize_size"] == 232
    assert info["weights"]["name"] == "colours.pth"
    assert info["weights"]["trained"] is True
    assert re.fullmatch(r"[0-9a-f]{64}", info["weights"]["sha256"])
    precision = "bf16" if has_bf16() else "fp32"  # what `auto` takes
    assert (info["precision"], info["engine"]) == (precision, f"openvino-{precision}")
    assert info["device"] == "cpu"
    assert info["libraries"]["torchserve"] == "0.12.0"
    assert info["settings"]["max_images"] == 32


def test_metrics_count_what_was_answered(server: Server) -> None:
    before = settled(server)
    for label in LABELS:
        requests.post(server.predictions, data=encoded(label), timeout=30)
    requests.post(server.predictions, data=b"no image", timeout=30)
    files = {"file1": encoded("red"), "file2": b"%PDF-"}
    requests.post(server.predictions, files=files, timeout=30)
    after = settled(server)

    def rise(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    assert rise("classifier_requests_total", status="200") == 4
    assert rise("classifier_requests_total", status="400") == 1
    assert rise("classifier_images_total", outcome="success") == 4
    assert rise("classifier_images_total", outcome="UnreadableImage") == 1
    assert rise("classifier_images_total", outcome="UnsupportedFormat") == 1
    for stage in ("preprocess", "inference", "postprocess", "total"):
        buckets = sorted(
            (float(dict(labels)["le"]), count)
            for (name, labels), count in after.items()
            if name == "classifier_stage_seconds_bucket" and ("stage", stage) in labels
        )
        counts = [count for _, count in buckets]
        assert counts == sorted(counts)
        assert len(buckets) == 23
        assert counts[-1] == value(after, "classifier_stage_seconds_count", stage=stage)
        assert rise("classifier_stage_seconds_sum", stage=stage) > 0


def test_metrics_have_types(server: Server) -> None:
    text = requests.get(f"{server.metrics}/metrics", timeout=10).text
    assert "# TYPE classifier_requests_total counter" in text


def test_a_request_is_one_json_line(server: Server) -> None:
    response = requests.post(
        server.predictions, files={"file": encoded("blue")}, data={"filename": "a.jpg"}, timeout=30
    )
    request_id = response.headers["x-request-id"]
    line = server.request_line(request_id)
    assert line["status"] == 200
    assert line["model"] == "mobilenet_v2"
    assert line["version"] == "1.0"
    assert line["top_class"] == "blue"
    stages = line["preprocess_ms"], line["inference_ms"], line["postprocess_ms"]
    assert all(stage > 0 for stage in stages)
    assert line["total_ms"] >= max(stages)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line["time"])
    assert request_id == response.json()["metadata"]["request_id"]


def test_the_log_is_json_and_quiet(server: Server) -> None:
    """After the banner every line is JSON, and none but ours and warnings is written."""
    lines = server.text().split("Ready after")[1].splitlines()[1:]
    events = [json.loads(line)["event"] for line in lines if line]
    assert events
    assert set(events) <= {"request", "model_ready", "torchserve"}


def addresses(server: Server) -> list[str]:
    return ["--management", server.management, "--predictions", server.url]


def test_healthcheck(server: Server) -> None:
    done = run("healthcheck.py", *addresses(server), server.model)
    assert (done.returncode, done.stdout) == (0, "mobilenet_v2: 2 of 2 workers READY\n")
    done = run("healthcheck.py", *addresses(server), server.model, "unknown")
    assert done.returncode == 1
    assert "unknown: not registered" in done.stdout
    assert run("healthcheck.py", "--management", "http://127.0.0.1:9").returncode == 1
    counted = re.compile(r'^classifier_probes_total\{.*status="200".*\} [1-9]', re.MULTILINE)
    metrics = f"{server.metrics}/metrics"  # workers hand over their counts once a second
    wait_for(lambda: counted.search(requests.get(metrics, timeout=30).text), 30)


def test_predict_prints_a_table(server: Server, tmp_path: Path) -> None:
    for label in LABELS:
        (tmp_path / f"{label}.jpg").write_bytes(encoded(label))
    images = [str(tmp_path / f"{label}.jpg") for label in LABELS]
    done = run("predict.py", "--url", server.url, "--top-k", "2", *images)
    assert done.returncode == 0
    blocks = done.stdout.strip().split("\n\n")
    assert len(blocks) == 3
    for label, block in zip(LABELS, blocks, strict=True):
        head, first, _second = block.splitlines()
        assert f"{label}.jpg  320x240" in head
        assert f"{label} ({LABELS.index(label)})" in first


@pytest.mark.parametrize("machine", [True, False])
def test_predict_tells_failures(server: Server, tmp_path: Path, machine: bool) -> None:
    (tmp_path / "good.png").write_bytes(encoded("red", "PNG"))
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    images = [str(tmp_path / name) for name in ("good.png", "bad.jpg", "missing.jpg")]
    options = ["--json"] if machine else []
    done = run("predict.py", "--url", server.url, "--top-k", "3", *options, *images)
    assert done.returncode == 1
    if machine:
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        assert [answer["status"] for answer in answers] == ["success", "error", "error"]
        assert answers[0]["metadata"]["filename"] == "good.png"
        assert [answer["type"] for answer in answers[1:]] == ["UnreadableImage", "UnreadableFile"]
    else:
        assert "UnreadableImage" in done.stdout


def test_predict_without_a_server() -> None:
    image = str(ROOT / "examples" / "clock.jpg")
    done = run("predict.py", "--url", "http://127.0.0.1:9", image)
    assert done.returncode == 1
    assert "is ./scripts/serve running?" in done.stdout
    assert "Traceback" not in done.stderr
