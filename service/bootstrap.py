"""Make .venv match the pinned requirements, with the system's Python and the standard library."""

from __future__ import annotations  # so that an old Python gets as far as the message for it

import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from subprocess import CalledProcessError

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "installed.json"
GPU_REQUIREMENTS = "requirements-gpu.txt"  # optional: without it a GPU decodes fewer JPEGs
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def set_up(requirements: Sequence[str], torch_build: str) -> None:
    """Create or update .venv; does nothing, and writes nothing, if the pins have not changed.

    Raises CalledProcessError if venv or pip failed (they have said why).
    """
    required = {
        name: hashlib.sha256((ROOT / name).read_bytes()).hexdigest()
        for name in {"requirements.txt", *requirements, *_included(requirements)}
    }
    if _is_current(_read_stamp(), required, torch_build):
        return
    with (ROOT / ".venv.lock").open("w") as lock:  # serve and test may start side by side
        fcntl.flock(lock, fcntl.LOCK_EX)
        installed = _read_stamp()
        if _is_current(installed, required, torch_build):
            return
        torch = installed.get("torch")
        build = torch or "auto" if torch_build == "auto" else torch_build
        missing = sorted(name for name in required if installed.get(name) != required[name])
        is_renewed = "requirements.txt" in missing  # which has torch, TorchServe and Java
        if torch != build or is_renewed:
            what = "Setting up .venv (once; torch is a large download)"
        else:
            what = f"Adding {', '.join(missing)} to .venv"
        print(f"{what} …", file=sys.stderr, flush=True)
        if not installed:
            _run([sys.executable, "-m", "venv", "--clear", VENV])
            # The repository itself becomes importable, as an editable install would make it. The
            # path is relative: a checkout that is moved or copied never runs another one's code,
            # and Python reads such files in ASCII if LC_ALL is C.
            site = next((VENV / "lib").glob("python*/site-packages"))
            (site / "repository.pth").write_text(f"{os.path.relpath(ROOT, site)}\n")
        STAMP.unlink(missing_ok=True)  # an interrupted set-up starts over
        if torch not in (None, build):
            _pip("uninstall", "--yes", "torch", "torchvision")
        if torch != build or is_renewed:
            build = _install_torch(build)  # before the rest, which would take the default build
        _pip("install", *(f"--requirement={ROOT / name}" for name in requirements))
        if build == "cuda" and has_gpu():
            with suppress(CalledProcessError):  # it has said so; the service does without
                _pip("install", f"--requirement={ROOT / GPU_REQUIREMENTS}")
        if is_renewed:
            with suppress(CalledProcessError):  # it has said so; Java does without
                _run([PYTHON, ROOT / "scripts" / "java_cds.py"])
        facts = {"torch": build, "python": _real_python()}
        STAMP.write_text(json.dumps(installed | required | facts))


def _is_current(installed: dict[str, str], required: dict[str, str], torch_build: str) -> bool:
    """Whether a set-up has nothing to do."""
    return torch_build in ("auto", installed.get("torch")) and required.items() <= installed.items()


def _included(requirements: Sequence[str]) -> list[str]:
    """The files that requirements files take in with -r."""
    text = "".join((ROOT / name).read_text() for name in requirements)
    return re.findall(r"^-r (\S+)", text, re.MULTILINE)


def _install_torch(build: str) -> str:
    """Install the pinned torch and torchvision; returns the build taken, "cpu" or "cuda"."""
    text = (ROOT / "requirements.txt").read_text()
    pins = re.findall(r"^(?:torch|torchvision)==\S+", text, re.MULTILINE)
    if build == "cpu":
        _pip("install", "--index-url", CPU_INDEX, *pins)
        return "cpu"
    if build == "cuda" or platform.system() != "Linux":
        reason = "as chosen" if build == "cuda" else "the only one on this system"
    elif has_gpu():
        reason = "there is a GPU"
    elif cpu_index_answers():
        print(f"torch: the CPU build from {CPU_INDEX} (there is no GPU)", file=sys.stderr)
        try:
            _pip("install", "--index-url", CPU_INDEX, *pins)
            return "cpu"
        except CalledProcessError:
            reason = "the CPU build could not be installed"
    else:
        reason = "no GPU here, but PyTorch's CPU index does not answer"
    print(f"torch: the default build ({reason})", file=sys.stderr, flush=True)
    _pip("install", *pins)
    return "cuda"


def has_gpu() -> bool:
    """Whether an NVIDIA driver lists a GPU."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return False
    listed = subprocess.run([smi, "-L"], capture_output=True, text=True, check=False)
    return listed.returncode == 0 and "GPU" in listed.stdout


def cpu_index_answers(url: str = f"{CPU_INDEX}/torch/", seconds: float = 3) -> bool:
    """Ask PyTorch's CPU index once, in a process of its own: no DNS lookup outlasts the limit."""
    probe = f"import urllib.request; urllib.request.urlopen({url!r})"
    try:
        asked = subprocess.run(
            [sys.executable, "-c", probe], capture_output=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return False
    return asked.returncode == 0


def _pip(*args: object) -> None:
    quiet = [] if sys.stderr.isatty() else ["--quiet"]
    _run([PYTHON, "-m", "pip", *args, "--disable-pip-version-check", *quiet])


def _run(command: list[object]) -> None:
    """Run with what it prints on stderr, so that stdout is the command's own."""
    subprocess.run([str(word) for word in command], check=True, stdout=sys.stderr)


def _read_stamp() -> dict[str, str]:
    """What is installed; nothing in a .venv that was never finished, or whose Python is gone."""
    try:
        installed = dict(json.loads(STAMP.read_text()))
    except (OSError, ValueError):
        return {}
    # An upgrade of the system may leave another Python behind the same link, without our packages.
    same = installed.get("python", _real_python()) == _real_python()
    return installed if PYTHON.exists() and same else {}


def _real_python() -> str:
    return os.path.realpath(PYTHON)
