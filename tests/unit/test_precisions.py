"""What the suite itself does on a machine that lacks something: pytest in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

from tests import ROOT

TESTS = """
import pytest

@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.precision("fp32")
def test_fp32(number): pass

@pytest.mark.precision("bf16")
def test_bf16(): pass
"""


def test_without_bf16_its_tests_are_skipped_by_name_and_the_report_says_so(tmp_path: Path) -> None:
    """Even if nothing else may be skipped; a machine that has bf16 plays one that has not."""
    (tmp_path / "test_both.py").write_text(TESTS)
    options = ["-p", "tests.conftest", "-p", "no:cacheprovider", "-q", "-n", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-c", "pyproject.toml", *options, tmp_path],
        cwd=ROOT,
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "REQUIRE_EVERYTHING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    skips, cpu, limit, ran, lacking, summary = done.stdout.splitlines()[-6:]
    assert skips.startswith("SKIPPED [1]")
    assert skips.endswith("this CPU does not compute in bf16")
    assert cpu.startswith("CPU: ")
    assert ", OpenVINO: " in cpu
    assert "FP32" in cpu
    assert limit == "Of these only what ONEDNN_MAX_CPU_ISA=AVX512_CORE allows is used"
    assert ran == "Precisions tested: fp32 (2 tests)"
    assert lacking == "Precisions skipped: bf16 (this CPU does not compute in it)"
    assert summary.startswith("2 passed, 1 skipped")
