"""The benchmark for GPUs goes its whole way on a CPU, too."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import JSON_FILE, PLOT_FILE, main

SHORT = "--seconds 1 --limit-seconds 120 --minutes 20 --clients 8 --batches 1 2 --batch-size 2"
CHANGED = "--processes 2 --workers 1 --generators 2 --no-venv --precision fp32"


def test_the_whole_way_on_a_cpu(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv = ["--device", "cpu", "--model", "squeezenet1_1", *SHORT.split(), *CHANGED.split()]
    main([*argv, "--out", str(tmp_path)])
    lines = capfd.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    assert report == json.loads((tmp_path / JSON_FILE).read_text())
    assert (tmp_path / PLOT_FILE).read_bytes().startswith(b"\x89PNG")
    assert report["conditions"]["device"] == "cpu"
    parts = report["parts"]
    names = ["check", "model", "decoding", "inprocess", "ours", "empty", "stock", "workers 1"]
    assert list(parts) == names
    # The time that is planned comes first, and then the parts in turn.
    titles = [line for line in lines if "(at most" in line]
    assert len(titles) == len(names)
    assert lines.index(titles[0]) > lines.index(next(x for x in lines if x.startswith("part ")))
    failed = {name: part["failed"] for name, part in parts.items() if part["failed"]}
    assert failed == {"stock": "error: this Python lacks captum"}

    exact, on_gpu = parts["check"]["rows"]
    assert (exact["engine"], exact["decoder"], exact["mean_levels"]) == ("openvino-fp32", "cpu", 0)
    assert exact["same_best_class"] > 0.9
    assert exact["largest_difference"] < 0.003
    assert on_gpu["reason"] == "decoder is gpu, and device is cpu"
    assert [row["batch"] for row in parts["model"]["rows"]] == [1, 2]
    assert [(row["batch"], row["processes"]) for row in parts["inprocess"]["rows"]] == [(2, 2)]
    assert {row["threads"] for row in parts["decoding"]["rows"]} >= {1}
    keys = [(row["images"], row["clients"]) for row in parts["ours"]["rows"]]
    assert (
        keys
        == [(1, 8), (8, 2)]
        == [(row["images"], row["clients"]) for row in parts["empty"]["rows"]]
    )
    assert [row["workers"] for row in parts["workers 1"]["rows"]] == [1]
    rows = [row for part in parts.values() for row in part["rows"] if "reason" not in row]
    assert all(row.get("images_per_second", 1) > 0 for row in rows)
    assert all(row.get("failed", 0) == row.get("refused", 0) == 0 for row in rows)
    verdicts = {bar["what"]: bar["verdict"] for bar in report["bars"]}
    assert verdicts["one image a request, of the stock handler"] == "not measured"
    assert verdicts["in process, JPEG bytes to top-5"] == "missed"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == (
        "error: there is no GPU here; --device cpu tries the same without\n"
    )
    assert not (tmp_path / "none").exists()
