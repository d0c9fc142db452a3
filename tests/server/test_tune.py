"""A short tuning from end to end, and a server that is started with what it found."""

import json
from pathlib import Path

from service.tuning.tuned import read_tuned
from tests.server.serving import package, run_script, serving

MODEL = "shufflenet_v2_x0_5"
OPTIONS = ["--model", MODEL, "--weights", "untrained", "--device", "cpu"]
# The untuned server would take 1 ms and a batch of 4.
GIVEN = ["--precision", "fp32", "--workers", "1", "--batch-size", "3", "--max-batch-delay-ms", "2"]
TUNING = "--slo-p99-ms 10000 --seconds 1 --concurrency 2 --budget-minutes 0.4".split()


def test_a_server_takes_what_tuning_has_found(tmp_path: Path) -> None:
    package(tmp_path, *OPTIONS, *GIVEN)
    done = run_script("tune", tmp_path, *OPTIONS, *GIVEN, *TUNING)
    assert done.returncode == 0, done.stderr
    trials = json.loads(done.stdout.splitlines()[-1])["trials"]
    assert all(trial["points"] for trial in trials), trials
    path = tmp_path / "store" / f"tuned-{MODEL}.yaml"
    tuned = read_tuned(path, MODEL)
    fastest = max(point["throughput_rps"] for trial in trials for point in trial["points"])
    assert tuned.facts.throughput_rps == round(fastest, 1)
    assert path.with_suffix(".png").exists()

    with serving(tmp_path, *OPTIONS, "--tuned", model=MODEL) as server:
        state, info = server.describe(), server.info()
    assert "warning" not in server.text()
    assert (state["minWorkers"], state["batchSize"], state["maxBatchDelay"]) == (1, 3, 2)
    assert info["engine"] == f"{tuned.handler.engine}-fp32"
    for name in ("threads", "max_forward"):
        assert info["settings"][name] == getattr(tuned.handler, name)
