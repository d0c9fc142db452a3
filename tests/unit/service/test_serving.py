"""What ./scripts/serve makes ready before Java starts."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from handler.errors import SetupError
from service import serving
from service.archive.mar import read_card
from service.logs import Log
from service.options import parse_serve
from service.plan import plan_service
from tests.processes import free_ports
from tests.unit.service.planning import MODEL, planned


@pytest.mark.parametrize("packaged", ["now", "before", "given"])
def test_an_archive_that_is_replaced_after_the_check_is_not_served(
    archive: Path, monkeypatch: pytest.MonkeyPatch, packaged: str
) -> None:
    """As by another start, with other weights, in the same store."""
    monkeypatch.setenv("TS_MODEL_STORE", str(archive.parent))
    monkeypatch.setenv("JAVA_HOME", str(archive.parent / "java"))
    java = archive.parent / "java" / "bin" / "java"
    java.parent.mkdir(parents=True)
    java.write_text("#!/bin/sh\nexit 0\n")
    java.chmod(0o755)
    if packaged == "now":
        monkeypatch.setattr(serving, "is_current", lambda plan: False)
        monkeypatch.setattr(serving, "package_apart", lambda plans: 0)
    model = ["--model", MODEL, "--weights", "untrained"]
    if packaged == "given":
        model = ["--archive", str(archive)]
    ports = [f"--{name}={port}" for name, port in free_ports().items()]
    options = parse_serve([*model, "--workers", "1", *ports])
    server, _ = serving.prepare(plan_service(options), Log("json"))
    server.start()  # nothing has changed
    server.stop()
    server, _ = serving.prepare(plan_service(options), Log("json"))
    with zipfile.ZipFile(archive) as old:
        contents = {name: old.read(name) for name in old.namelist()}
    card = json.loads(contents["model.json"])
    contents["model.json"] = json.dumps(card | {"inputs_sha256": "0" * 64}).encode()
    with zipfile.ZipFile(archive.parent / "other", "w") as new:
        for name, content in contents.items():
            new.writestr(name, content)
    (archive.parent / "other").replace(archive)
    with pytest.raises(SetupError, match=r"mar was replaced by another while this started"):
        server.start()
    server.stop()


def test_packaging_takes_plans_in_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever modules are in the folder that the command was called in."""
    monkeypatch.chdir(tmp_path)
    for name in ("service.py", "handler.py", "random.py"):
        (tmp_path / name).write_text("raise SystemExit(9)\n")
    plan = planned(tmp_path / "store")
    assert serving.package_apart([plan]) == 0
    assert serving.package_apart([planned(tmp_path, model="birdnet")]) == 2
    card = read_card(plan.archive)
    assert card is not None
    assert card.architecture == MODEL


def test_packaging_that_is_killed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "PACKAGE", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(SetupError, match="packaging was killed by signal 9"):
        serving.package_apart([planned(tmp_path)])


def test_a_tuned_file_that_is_damaged_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tuned.yaml").write_text("workers: 3")
    argv = ["--model", MODEL, "--tuned", str(tmp_path / "tuned.yaml")]
    done = subprocess.run(
        [sys.executable, "scripts/serve.py", *argv],
        env=os.environ | {"TS_MODEL_STORE": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path / 'tuned.yaml'}: workers is unknown")
