"""The table of ./scripts/predict, on terminals of every kind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tests.drawing import encode, plain
from tests.unit.conftest import Web

ANSWER = {
    "status": "success",
    "predictions": [{"class": "Käfer 猫", "class_id": 3, "confidence": 0.5}],
    "metadata": {
        "image_size": [64, 48],
        "inference_time": 0.01,
        "model": "m",
        "version": "1.0",
        "weights": "w",
    },
}


def predict(web: Web, image: str, encoding: str) -> subprocess.CompletedProcess[bytes]:
    web.answers["/predictions/m"] = web.text(json.dumps(ANSWER), content_type="application/json")
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / "predict.py", image, "--url", web.url, "--model", "m"],
        env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"},
        capture_output=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("encoding", "bar", "label"),
    [
        ("utf-8", "█", "Käfer 猫"),
        ("latin-1", "#", r"Käfer \u732b"),
        ("ascii", "#", r"K\xe4fer \u732b"),
        ("cp437", "█", r"Käfer \u732b"),
    ],
)
def test_any_terminal_shows_the_table(
    web: Web, tmp_path: Path, encoding: str, bar: str, label: str
) -> None:
    image = tmp_path / "image.png"
    image.write_bytes(encode(plain()))
    done = predict(web, str(image), encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    line = done.stdout.decode(encoding).splitlines()[1]
    assert line.split() == ["50.00%", bar * 10, *label.split(), "(3)"]


@pytest.mark.skipif(sys.platform == "darwin", reason="a file's name on macOS is always text")
def test_a_file_whose_name_is_no_text(web: Web, tmp_path: Path) -> None:
    image = os.fsdecode(bytes(tmp_path) + b"/\xff.png")
    Path(image).write_bytes(encode(plain()))
    done = predict(web, image, "utf-8")
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"\udcff.png  64x48" in done.stdout


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.py")), ids=lambda p: p.name)
def test_help_of_every_command_on_any_terminal(script: Path) -> None:
    if script.stem in ("__init__", "bootstrap", "java_cds"):
        return
    done = subprocess.run(
        [sys.executable, script, "--help"],
        env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"usage:" in done.stdout
