"""What operators use: the management API, info, and the scripts around them."""

import json
import re
import zipfile
from pathlib import Path

import pytest
import requests

from handler.openvino_engine import has_bf16
from tests import ROOT
from tests.processes import wait_for
from tests.server.colours import LABELS, encoded
from tests.server.serving import Server, run_script


def test_models_cannot_be_registered_or_removed(server: Server) -> None:
    url = f"{server.management}/models"
    assert requests.post(f"{url}?url=x.mar", timeout=10).status_code == 405
    assert requests.delete(f"{url}/{server.model}", timeout=10).status_code == 405


def test_no_workflow_can_be_registered(server: Server, tmp_path: Path) -> None:
    """POST /workflows would run the handler of an archive, and has no switch of its own."""
    archive, proof = tmp_path / "evil.war", tmp_path / "proof"
    workflow = {"workflowName": "evil", "specFile": "s.yaml", "handler": "h.py"}
    with zipfile.ZipFile(archive, "w") as war:
        manifest = {"createdOn": "", "archiverVersion": "0.2.15", "workflow": workflow}
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


def addresses(server: Server) -> list[str]:
    return ["--management", server.management, "--predictions", server.url]


def test_healthcheck(server: Server, tmp_path: Path) -> None:
    done = run_script("healthcheck", tmp_path, *addresses(server), server.model)
    assert (done.returncode, done.stdout) == (0, "mobilenet_v2: 2 of 2 workers READY\n")
    done = run_script("healthcheck", tmp_path, *addresses(server))
    assert done.returncode == 0
    assert f"{server.model}: 2 of 2 workers READY\n" in done.stdout
    done = run_script("healthcheck", tmp_path, *addresses(server), server.model, "unknown")
    assert done.returncode == 1
    assert "unknown: not registered" in done.stdout
    done = run_script("healthcheck", tmp_path, "--management", "http://127.0.0.1:9")
    assert done.returncode == 1
    counted = re.compile(r'^classifier_probes_total\{.*status="200".*\} [1-9]', re.MULTILINE)
    metrics = f"{server.metrics}/metrics"  # workers hand over their counts every 5 s
    wait_for(lambda: counted.search(requests.get(metrics, timeout=30).text), 30)


def test_predict_prints_a_table(server: Server, tmp_path: Path) -> None:
    for label in LABELS:
        (tmp_path / f"{label}.jpg").write_bytes(encoded(label))
    images = [str(tmp_path / f"{label}.jpg") for label in LABELS]
    done = run_script("predict", tmp_path, "--url", server.url, "--top-k", "2", *images)
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
    (tmp_path / "bad.zip").write_bytes(b"no archive")
    images = [str(tmp_path / name) for name in ("good.png", "bad.jpg", "bad.zip")]
    options = ["--json"] if machine else []
    done = run_script("predict", tmp_path, "--url", server.url, "--top-k", "3", *options, *images)
    assert done.returncode == 1
    if machine:
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        assert [answer["status"] for answer in answers] == ["success", "error", "error"]
        assert answers[0]["metadata"]["filename"] == "good.png"
        assert [answer["type"] for answer in answers[1:]] == [
            "UnreadableImage",
            "UnreadableArchive",
        ]
    else:
        assert "UnreadableImage" in done.stdout


def test_predict_without_a_server(tmp_path: Path) -> None:
    image = str(ROOT / "examples" / "clock.jpg")
    done = run_script("predict", tmp_path, "--url", "http://127.0.0.1:9", image)
    assert done.returncode == 1
    assert "is ./scripts/serve running?" in done.stdout
    assert "Traceback" not in done.stderr
