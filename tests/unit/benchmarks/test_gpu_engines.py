"""The comparison of ways to run a network, on the CPU."""

import json
from typing import Any

import pytest

from benchmarks.gpu_engines import child, main, parse_args, summary

SMALL = ["--device", "cpu", "--batches", "1", "2", "--seconds", "0.01", "--precision", "bf16"]


def test_ways_are_compared(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # more wait for each other on a busy machine
    ways = ["--ways", "fused", "TensorRT"]
    assert main(["--model", "squeezenet1_1", *SMALL, *ways, "--limit-seconds", "200"]) == 0
    lines = capsys.readouterr().out.splitlines()
    fused, searched, tensorrt = json.loads(lines[-1])["rows"]
    for row, search in ((fused, False), (searched, True)):
        assert (row["model"], row["way"], row["search"]) == ("squeezenet1_1", "fused", search)
        assert set(row["images_per_second"]) == {"1", "2"}
        assert min(row["images_per_second"].values()) > 0
        assert row["build_seconds"] > 0
        assert 0 <= row["largest_difference"] < 0.01
        assert not row["failed"]
    assert tensorrt["failed"]
    assert tensorrt["notes"] == ["ModuleNotFoundError: No module named 'torch_tensorrt'"]
    assert [line.split()[1] for line in lines[2:5]] == ["fused", "fused", "TensorRT"]
    assert lines[4].endswith(tensorrt["notes"][0])


def test_what_takes_too_long_is_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    options = [*SMALL, "--ways", "folded", "--limit-seconds", "0.1"]
    assert main(["--model", "squeezenet1_1", *options]) == 1
    for row in json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]:
        assert row["notes"] == ["not finished after 0.1 s"]
        assert (row["images_per_second"], row["build_seconds"]) == ({}, None)


def test_a_network_without_relu_is_not_called_fused(capsys: pytest.CaptureFixture[str]) -> None:
    args = parse_args(["--child", "--model", "mobilenet_v2", *SMALL, "--ways", "fused"])
    assert child(args) == 1
    assert json.loads(capsys.readouterr().out) == {"reason": "ValueError: there is nothing to fuse"}


def test_what_was_measured_before_a_failure_stays() -> None:
    measured: dict[str, Any] = {"build_seconds": 2.0, "largest_difference": 0.01, "note": "few"}
    batches = [{"batch": 64, "images_per_second": 9.0} | measured]
    batches.append({"batch": 32, "images_per_second": 8.0} | measured | {"build_seconds": 1.0})
    assert summary(batches, ["killed"]) == {
        "images_per_second": {64: 9.0, 32: 8.0},
        "build_seconds": 3.0,
        "largest_difference": 0.01,
        "notes": ["few", "killed"],
        "failed": True,
    }
