"""Short campaigns of ./scripts/chaos: one that must be clean, and one whose mends are taken out."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT, skip
from tests.server.serving import environment

SECONDS = 400  # for a campaign, its set-up included; some 80 on two quiet cores
CODE = ("handler", "service", "scripts", "deploy", "examples", "config.properties")

# What was mended once, and how it was before: rule, file, text, text before.
MENDS = (
    (
        "undeserved 5xx",
        "deploy/gateway/gateway.lua",
        "of_old and replica or try_again_at(first, replica)",
        "of_old and replica",
    ),
    ("orphans", "service/processes.py", "kill -9 $groups", ":"),
    (
        "orphans",
        "service/processes.py",
        'return [setpriv, "--pdeathsig", "KILL", "--"]',
        "return []",
    ),
    ("held up", "service/gateway/watch.py", "FAILURES = 2 ", "FAILURES = 1000000 "),
    (
        "no alert",
        "deploy/monitoring/alerts.yml",
        'up{job="classifier"} == 0',
        'up{job="classifier"} == -1',
    ),
)


def campaign(
    folder: Path, store: Path, *faults: tuple[str, int, float], root: Path = ROOT
) -> dict[str, Any]:
    """Run a campaign of faults, each with its replica and seconds; its last line."""
    schedule = folder / "schedule"
    names = ("fault", "replica", "seconds", "calm")
    lines = [json.dumps(dict(zip(names, (*step, 1.0), strict=True))) for step in faults]
    schedule.write_text("\n".join(lines))
    command = [sys.executable, str(root / "scripts" / "chaos.py"), "--seed=1"]
    done = subprocess.run(
        [
            *command,
            f"--replay={schedule}",
            f"--archive={store / 'mobilenet_v2.mar'}",
            "--prometheus",
        ],
        env=environment(folder, {"PYTHONPATH": str(root)}),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    line: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert line["clean"] == (done.returncode == 0), done.stdout
    assert line["requests"] > 50
    print(done.stdout)
    return line


@pytest.fixture(autouse=True)
def prometheus() -> None:
    """Whoever has not installed it runs ./scripts/chaos without the option."""
    if not shutil.which("prometheus"):
        skip("prometheus is not installed (apt-get install prometheus)")


@pytest.mark.timeout(SECONDS + 200)  # the archive is packaged within it
def test_a_short_campaign_is_clean(tmp_path: Path, store: Path) -> None:
    line = campaign(
        tmp_path,
        store,
        ("kill_worker", 0, 0.5),
        ("new_keys", -1, 0.5),
        ("stop_java", 1, 5.0),
        ("bad_multipart", -1, 0.5),
        ("kill_nginx_worker", -1, 0.5),
        ("full_disk", 0, 3.0),
        ("slow_bodies", -1, 0.5),
        ("kill_launcher", 1, 0.5),
    )
    assert line["clean"]
    assert line["faults"] + len(line["not_possible"]) == 8
    assert os.geteuid() or not line["not_possible"]


@pytest.mark.timeout(SECONDS + 200)  # the archive is packaged within it
def test_a_campaign_finds_mends_that_are_taken_out(tmp_path: Path, store: Path) -> None:
    root = tmp_path / "checkout"
    root.mkdir()
    for name in CODE:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, root / name)
    for _, file, text, before in MENDS:
        code = (root / file).read_text("utf-8")
        assert code.count(text) == 1, f"{file} has changed: {text}"
        (root / file).write_text(code.replace(text, before), "utf-8")
    line = campaign(
        tmp_path,
        store,
        ("kill_worker", 0, 0.5),
        ("stop_java", 0, 30.0),
        ("kill_launcher", 0, 0.5),
        root=root,
    )
    assert not line["clean"]
    expected = {rule for rule, *_ in MENDS}
    assert {rule for rule in expected if line["broken"][rule]} == expected, line
