"""The handler in processes, where one fails: no process waits for another that will not come."""

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.subjects import PEERS
from tests import ROOT

HANDLER = """
from pathlib import Path

class ImageClassifier:
    def initialize(self, context):
        try:
            Path(__file__).with_name("first").touch(exist_ok=False)
        except FileExistsError:
            return  # it is the second process, which is ready
        {fault}
"""


def run(folder: Path, fault: str) -> subprocess.CompletedProcess[str]:
    (folder / "image_classifier.py").write_text(HANDLER.format(fault=fault))
    (folder / "model-config.yaml").write_text("minWorkers: 1\n")
    (folder / "MAR-INF").mkdir()
    (folder / "MAR-INF" / "MANIFEST.json").write_text("{}")
    environ = {"PYTHONPATH": f"{folder}:{ROOT}", "BENCHMARK_MODEL_DIR": str(folder)}
    command = [sys.executable, str(PEERS / "inprocess.py"), "--processes", "2", "--seconds", "1"]
    return subprocess.run(
        command, env=os.environ | environ, capture_output=True, text=True, timeout=150, check=False
    )


def test_an_error_is_the_reason(tmp_path: Path) -> None:
    done = run(tmp_path, 'raise ValueError("no such model")')
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ValueError: no such model"


def test_a_process_that_dies_ends_the_others(tmp_path: Path) -> None:
    done = run(tmp_path, "import os; os._exit(3)")
    assert done.returncode == 1
    assert "BrokenProcessPool" in done.stderr.splitlines()[-1]
