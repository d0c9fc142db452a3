"""The set-up's questions to the machine, and when it has nothing to do."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from scripts.bootstrap import main
from service import bootstrap
from service.bootstrap import cpu_index_answers, has_gpu, set_up
from tests.unit.conftest import Web

LISTED = "GPU 0: NVIDIA H200 (UUID: GPU-5c1f)"


@pytest.mark.parametrize(
    ("output", "status", "found"),
    [
        (LISTED, 0, True),
        ("No devices found.", 0, False),
        ("NVIDIA-SMI has failed because it could not communicate with the driver.", 9, False),
        (LISTED, 1, False),
    ],
    ids=["GPU", "no devices", "no driver", "failing"],
)
def test_has_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, status: int, found: bool
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert has_gpu() is False  # without nvidia-smi
    script = tmp_path / "nvidia-smi"
    script.write_text(f"#!/bin/sh\n[ \"$*\" = -L ] || exit 64\necho '{output}'\nexit {status}\n")
    script.chmod(0o755)
    assert has_gpu() is found


def test_an_index_answers_or_refuses_or_is_not_there(web: Web, closed_port: int) -> None:
    web.answers["/whl/cpu/torch/"] = web.text("<a>torch</a>")
    assert cpu_index_answers(f"{web.url}/whl/cpu/torch/", 30) is True
    assert web.asked == ["/whl/cpu/torch/"]
    assert cpu_index_answers(f"{web.url}/other/", 30) is False
    assert cpu_index_answers(f"http://127.0.0.1:{closed_port}/", 30) is False


def test_index_that_never_answers_costs_no_more_than_the_limit(silent_port: int) -> None:
    started = time.perf_counter()
    assert cpu_index_answers(f"http://127.0.0.1:{silent_port}/", 0.5) is False
    assert 0.5 <= time.perf_counter() - started < 3


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose .venv was set up from its requirements."""
    root = tmp_path / "übung"  # in the locale C, Python reads .pth files as ASCII
    (root / ".venv" / "bin").mkdir(parents=True)
    (root / "requirements.txt").write_text("torch==2.0.0\ntorchvision==0.15.0\nrequests==2.0\n")
    (root / "requirements-dev.txt").write_text("-r requirements.txt\npytest==9.0\n")
    names = {"ROOT": "", "VENV": ".venv", "PYTHON": ".venv/bin/python"}
    for name, place in (names | {"STAMP": ".venv/installed.json"}).items():
        monkeypatch.setattr(bootstrap, name, root / place)
    bootstrap.PYTHON.touch()
    stamp(root, "cpu", "requirements.txt")
    return root


def stamp(root: Path, build: str, *names: str) -> None:
    hashes = {name: hashlib.sha256((root / name).read_bytes()).hexdigest() for name in names}
    bootstrap.STAMP.write_text(json.dumps(hashes | {"torch": build}))


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What would be run, without the path of the Python in front."""
    run: list[list[str]] = []
    monkeypatch.setattr(
        bootstrap, "_run", lambda command: run.append([str(word) for word in command][1:])
    )
    return run


def installing(commands: list[list[str]], what: str) -> list[str]:
    """The one command in which pip installs it."""
    [found] = (command for command in commands if "install" in command and what in command)
    return found


@pytest.mark.parametrize("build", ["auto", "cpu"])
def test_nothing_is_done_if_the_pins_are_the_same(
    repository: Path, commands: list[list[str]], build: str
) -> None:
    before = bootstrap.STAMP.read_text()
    set_up(["requirements.txt"], build)
    assert commands == []
    assert bootstrap.STAMP.read_text() == before
    names = {path.name for path in repository.iterdir()}
    assert ".venv.lock" not in names, "a read-only checkout could not start"


def test_another_python_behind_the_same_link_is_set_up_anew(
    repository: Path, commands: list[list[str]]
) -> None:
    """As an upgrade of the system leaves it: the packages are in another Python's folder."""
    for version in ("3.11", "3.12"):
        (repository / f"python{version}").touch()
    bootstrap.PYTHON.unlink()
    bootstrap.PYTHON.symlink_to(repository / "python3.11")
    (bootstrap.VENV / "lib" / "python3.11" / "site-packages").mkdir(parents=True)
    set_up(["requirements-dev.txt"], "auto")
    commands.clear()
    set_up(["requirements-dev.txt"], "auto")
    assert commands == []
    bootstrap.PYTHON.unlink()
    bootstrap.PYTHON.symlink_to(repository / "python3.12")
    set_up(["requirements-dev.txt"], "auto")
    assert commands[0] == ["-m", "venv", "--clear", str(bootstrap.VENV)]


def test_a_checkout_that_is_moved_runs_its_own_code(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def only_venv(command: list[Any]) -> None:
        if "venv" in command:
            subprocess.run([*command, "--without-pip"], check=True)

    monkeypatch.setattr(bootstrap, "_run", only_venv)
    bootstrap.STAMP.unlink()
    (repository / "ours.py").write_text("")
    set_up(["requirements.txt"], "cuda")
    moved = repository.parent / f"{repository.name}-moved"
    shutil.copytree(repository, moved, symlinks=True)
    code = f"import ours; assert ours.__file__ == {str(moved / 'ours.py')!a}"
    for locale in ("C", "C.UTF-8"):
        command = [str(moved / ".venv/bin/python"), "-c", code]
        subprocess.run(command, env={"LC_ALL": locale}, cwd="/", check=True)


def test_what_a_command_needs_beside_is_added(
    repository: Path, commands: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither torch nor Java's classes are made anew."""
    set_up(["requirements-dev.txt"], "auto")
    assert capsys.readouterr().err == "Adding requirements-dev.txt to .venv …\n"
    [command] = commands
    assert f"--requirement={repository / 'requirements-dev.txt'}" in command


def test_changed_pins_are_installed_again(
    repository: Path, commands: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    requirements = repository / "requirements.txt"
    requirements.write_text(requirements.read_text() + "orjson==3.0\n")
    set_up(["requirements-dev.txt"], "auto")
    assert capsys.readouterr().err == "Setting up .venv (once; torch is a large download) …\n"
    assert [str(repository / "scripts" / "java_cds.py")] in commands
    assert "--index-url" in installing(commands, "torch==2.0.0")  # it stays the CPU build
    assert installing(commands, f"--requirement={repository / 'requirements-dev.txt'}")
    commands.clear()
    for name in ("requirements-dev.txt", "requirements.txt"):
        set_up([name], "auto")
    assert commands == []


def test_another_build_of_torch_replaces_the_first(
    repository: Path, commands: list[list[str]]
) -> None:
    set_up(["requirements.txt"], "cuda")
    install = installing(commands, "torch==2.0.0")
    assert "--index-url" not in install
    assert "uninstall" in commands[commands.index(install) - 1]
    assert json.loads(bootstrap.STAMP.read_text())["torch"] == "cuda"


def test_the_cpu_build_comes_from_its_own_index(
    repository: Path, commands: list[list[str]]
) -> None:
    stamp(repository, "cuda", "requirements.txt")
    set_up(["requirements.txt"], "cpu")
    assert "https://download.pytorch.org/whl/cpu" in installing(commands, "torch==2.0.0")
    assert json.loads(bootstrap.STAMP.read_text())["torch"] == "cpu"


def test_a_class_archive_that_fails_is_done_without(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(command: list[Any]) -> None:
        if "pip" not in command:
            raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(bootstrap, "_run", failing)
    stamp(repository, "cpu")
    set_up(["requirements-dev.txt"], "auto")
    assert "requirements-dev.txt" in json.loads(bootstrap.STAMP.read_text())


@pytest.mark.parametrize(("build", "gpu"), [("cuda", True), ("cuda", False), ("cpu", True)])
def test_what_only_gpus_need_is_installed_if_there_is_one(
    repository: Path, monkeypatch: pytest.MonkeyPatch, build: str, gpu: bool
) -> None:
    """If that fails, the set-up goes on, and is not tried again at every start."""
    asked = []

    def failing(command: list[Any]) -> None:
        if any("requirements-gpu.txt" in str(word) for word in command):
            asked.append(command)
            raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(bootstrap, "_run", failing)
    monkeypatch.setattr(bootstrap, "has_gpu", lambda: gpu)
    for _ in range(2):
        set_up(["requirements-dev.txt"], build)
    assert len(asked) == (1 if build == "cuda" and gpu else 0)
    assert json.loads(bootstrap.STAMP.read_text())["torch"] == build


def test_a_failing_set_up_is_one_line_and_starts_over(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(command: list[Any]) -> None:
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(bootstrap, "_run", failing)
    (repository / "requirements.txt").write_text("changed")
    assert main(["test"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: the set-up failed: ")
    assert not bootstrap.STAMP.exists()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files of requirements that would be installed for a command."""
    names: list[str] = []
    monkeypatch.setattr("scripts.bootstrap.set_up", lambda found, build: names.extend(found))
    monkeypatch.setattr("os.execv", lambda *command: None)
    return names


@pytest.mark.parametrize(
    ("argv", "needed"),
    [
        ("serve --require-signed public.pem", True),
        ("serve --require-signed=off", False),
        ("package --sign key.pem", True),
        ("serve", False),
    ],
)
def test_what_only_signatures_need_is_installed_for_them(
    asked: list[str], argv: str, needed: bool
) -> None:
    assert main(argv.split()) == 0
    assert ("requirements-signing.txt" in asked) is needed


@pytest.mark.parametrize(
    ("variable", "text", "file"),
    [
        ("GATEWAY_GRPC_PORT", "8001", "requirements-grpc.txt"),
        ("GATEWAY_JOBS_URL", "redis://jobs", "requirements-jobs.txt"),
    ],
)
def test_what_only_a_part_of_the_gateway_needs_is_installed_for_it(
    asked: list[str], monkeypatch: pytest.MonkeyPatch, variable: str, text: str, file: str
) -> None:
    def needed(command: str) -> bool:
        asked.clear()
        assert main([command]) == 0
        return file in asked

    off = {"GATEWAY_GRPC_PORT": "0", "GATEWAY_JOBS_URL": ""}
    monkeypatch.setenv(variable, text)
    assert [needed(command) for command in ("serve", "gateway", "package")] == [True, True, False]
    monkeypatch.setenv(variable, off[variable])
    assert not needed("gateway")
    monkeypatch.delenv(variable)
    assert not needed("serve")


@pytest.mark.parametrize(
    ("command", "url", "needed"),
    [("serve", "redis://cache", True), ("package", "redis://cache", False), ("serve", "", False)],
)
def test_what_only_the_shared_cache_needs_is_installed_for_it(
    asked: list[str], monkeypatch: pytest.MonkeyPatch, command: str, url: str, needed: bool
) -> None:
    monkeypatch.setenv("CLASSIFIER_CACHE_URL", url)
    assert main([command]) == 0
    assert ("requirements-cache.txt" in asked) is needed


@pytest.mark.parametrize(
    ("argv", "needed"),
    [
        ("serve --weights mlflow:models:/birds@champion", True),
        (f"package --weights=s3://models/w.pth --weights-sha256 {'0' * 64}", True),
        ("package --log-to mlflow:birds", True),
        ("serve --weights birds.pth", False),
        ("package", False),
    ],
)
def test_what_only_registries_need_is_installed_for_them(
    asked: list[str], argv: str, needed: bool
) -> None:
    assert main(argv.split()) == 0
    assert ("requirements-registry.txt" in asked) is needed


def test_old_pythons_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    assert main(["serve"]) == 2
    assert "Python 3.10 or newer is needed" in capsys.readouterr().err


def test_wrong_options_are_told_before_anything_is_installed(
    repository: Path, commands: list[list[str]]
) -> None:
    (repository / "requirements.txt").write_text("changed")
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--port", "0"])
    assert ended.value.code == 2
    assert commands == []


# --- ./scripts/serve in an environment of somebody else's


SERVE = bootstrap.ROOT / "scripts" / "serve"


@pytest.mark.parametrize(
    "environ",
    [
        {"PYTHONHOME": "/nowhere"},
        {"PYTHONPATH": "/nowhere"},
        {"PYTHONSAFEPATH": "1"},
        {"CDPATH": "{folder}"},
    ],
    ids=lambda environ: next(iter(environ)),
)
def test_variables_of_other_tools_do_no_harm(tmp_path: Path, environ: dict[str, str]) -> None:
    (tmp_path / "scripts").mkdir()  # where CDPATH would lead to
    extra = {name: text.format(folder=tmp_path) for name, text in environ.items()}
    command = ["bash", "scripts/serve", "--help"]
    options: dict[str, Any] = {"cwd": bootstrap.ROOT, "env": os.environ | extra, "text": True}
    done = subprocess.run(command, capture_output=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ./scripts/serve")


def test_a_link_to_the_command_is_the_command(tmp_path: Path) -> None:
    (tmp_path / "serve").symlink_to(SERVE)
    done = subprocess.run([tmp_path / "serve", "--help"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_command_starts_alike() -> None:
    commands = [path for path in SERVE.parent.iterdir() if os.access(path, os.X_OK)]
    names = {path.name for path in commands if path.is_file()}
    modules = {path.stem for path in SERVE.parent.glob("*.py")}
    assert names - {"test"} == modules - {"__init__", "bootstrap", "java_cds"}
    for name in names:
        text = (SERVE.parent / name).read_text()
        assert '/start.sh"\n' in text
        assert re.search(rf"^\(?start {name}\b", text, re.M)
