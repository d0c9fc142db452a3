"""Short rehearsals of small manifests: real replicas and gateways, real kills, no failures."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests import ROOT, skip
from tests.server.serving import environment

SECONDS = 280  # for a rehearsal
SMALL = ROOT / "tests" / "rehearsal" / "small.yaml"
REHEARSE = [sys.executable, str(ROOT / "scripts" / "rehearse.py")]


def rehearse(folder: Path, *argv: str, under: Sequence[str] = ()) -> CompletedProcess[str]:
    return subprocess.run(
        [*under, *REHEARSE, *argv, f"--manifests={SMALL}"],
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


@pytest.fixture(autouse=True)
def root() -> None:
    if os.geteuid():
        skip("a rehearsal needs root")


@pytest.mark.timeout(SECONDS + 100)  # the archive is packaged within it
def test_a_rollout_a_drain_a_death_and_a_day(tmp_path: Path, store: Path) -> None:
    scenarios = ["rollout", "drain", "kill", "day"]
    if not shutil.which("prometheus"):
        scenarios.remove("day")
    archive = f"--archive={store / 'mobilenet_v2.mar'}"
    done = rehearse(tmp_path, *scenarios, "--minutes=0.55", archive, "--dns-seconds=1")
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    assert [name.partition(" ")[0] for name in line["runs"]] == scenarios
    assert line["sent"] == line["right"] > 0
    assert line["restarts"] == 1  # of the one that was killed
    assert line["killed_by_grace"] == 0
    if "day" in scenarios:
        assert max(line["replicas"]) > line["replicas"][0] == 2  # more of them at noon


def test_a_root_that_may_not_mount(tmp_path: Path) -> None:
    """It says so at once."""
    done = rehearse(tmp_path, "rollout", under=["setpriv", "--bounding-set=-sys_admin"])
    assert done.returncode == 2
    assert "error: a rehearsal gives its processes a hosts file of their own" in done.stderr
