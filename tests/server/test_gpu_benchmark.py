"""The benchmark for GPUs goes its whole way on a CPU, too."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import JSON_FILE, PLOT_FILE, main

SHORT = "--seconds 2 --workers 1 --concurrency 2 --per-request 1 2 --batches 2".split()


def test_the_whole_way_on_a_cpu(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv = ["--device", "cpu", "--model", "squeezenet1_1", "--precision", "fp32", *SHORT]
    assert main([*argv, "--out", str(tmp_path)]) == 0
    report = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert report == json.loads((tmp_path / JSON_FILE).read_text())
    assert (tmp_path / PLOT_FILE).read_bytes().startswith(b"\x89PNG")
    assert report["conditions"]["device"] == "cpu"
    assert (report["engine"], report["precision"]) == ("openvino-fp32", "fp32")
    check = report["check"]
    assert check["passed"]
    assert check["engine"]["same_best_class"] > 0.9
    assert check["gpu_decoder_levels"]["largest"] < 0.01  # torchvision on the CPU plays the GPU
    assert [row["batch"] for row in report["model"]] == [1, 2]
    assert [row["batch"] for row in report["handler"]] == [1, 2]
    assert len(report["decoding"]) == 3
    keys = [(row["server"], row["workers"], row["images"]) for row in report["http"]]
    assert keys == [(name, 1, images) for name in ("ours-fp32", "empty") for images in (1, 2)]
    parts = ("model", "decoding", "handler", "http")
    assert all(row["images_per_second"] > 0 for part in parts for row in report[part])
    assert all(row["failed"] == 0 for row in report["http"])
    assert report["failed"] == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == (
        "error: torch sees no GPU here; --device cpu tries the same without\n"
    )
    assert not (tmp_path / "none").exists()
