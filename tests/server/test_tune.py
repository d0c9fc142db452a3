"""A short tuning from end to end, and a server that is started with what it found."""

import json
import subprocess
import sys
from pathlib import Path

from service.tuning.tuned import read_tuned
from tests import ROOT
from tests.server.serving import environment, serving

MODEL = "shufflenet_v2_x0_5"
OPTIONS = ["--model", MODEL, "--weights", "untrained", "--device", "cpu"]
# The untuned server would take 1 ms and a batch of 4.
GIVEN = ["--precision", "fp32", "--workers", "1", "--batch-size", "3", "--max-batch-delay-ms", "2"]
TUNING = "--slo-p99-ms 10000 --seconds 1 --concurrency 2 --budget-minutes 0.4".split()
SECONDS = 180


def run_script(name: str, folder: Path, *argv: str) -> str:
    """What a script prints; it is told to end its servers if it takes too long."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / name), *argv],
        env=environment(folder, {"PYTHONPATH": str(ROOT)}),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        printed, _ = process.communicate(timeout=SECONDS)
    finally:
        process.terminate()
        process.wait(30)
    assert process.returncode == 0
    return printed


def test_a_server_takes_what_tuning_has_found(tmp_path: Path) -> None:
    run_script("package.py", tmp_path, *OPTIONS, *GIVEN)
    printed = run_script("tune.py", tmp_path, *OPTIONS, *GIVEN, *TUNING)
    trials = json.loads(printed.splitlines()[-1])["trials"]
    assert all(trial["points"] for trial in trials), trials
    path = tmp_path / "store" / f"tuned-{MODEL}.yaml"
    tuned = read_tuned(path, MODEL)
    fastest = max(point["throughput_rps"] for trial in trials for point in trial["points"])
    assert tuned.facts.throughput_rps == round(fastest, 1)
    assert path.with_suffix(".png").exists()

    env = {"PYTHONPATH": str(ROOT)}
    with serving(tmp_path, *OPTIONS, "--tuned", model=MODEL, env=env) as server:
        state, info = server.describe(), server.info()
    assert "warning" not in server.text()
    assert (state["minWorkers"], state["batchSize"], state["maxBatchDelay"]) == (1, 3, 2)
    assert info["engine"] == f"{tuned.handler.engine}-fp32"
    for name in ("threads", "max_forward"):
        assert info["settings"][name] == getattr(tuned.handler, name)
