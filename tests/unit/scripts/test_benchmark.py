"""./scripts/benchmark, the command."""

import json
from pathlib import Path

import pytest

from scripts.benchmark import main


def test_a_folder_without_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--images", str(tmp_path)]) == 2
    assert "has no .jpg" in capsys.readouterr().err


def test_the_command_ends_with_one_json_line(
    closed_port: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"http://127.0.0.1:{closed_port}"
    plot = tmp_path / "plot.png"
    times = ["--seconds", "0.1", "--warmup-seconds", "0.05"]
    status = main(["--url", url, "--concurrency", "2", "--rate", "20", *times, "--plot", str(plot)])
    assert status == 1  # nothing was answered
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["url"] == f"{url}/predictions/mobilenet_v2"
    assert [m["concurrency"] for m in last["measurements"]] == [2, 0]
    assert last["machine"]["cores"] >= 1
    assert plot.read_bytes().startswith(b"\x89PNG")
