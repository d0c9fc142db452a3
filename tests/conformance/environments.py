"""An environment for each foreign client, because their pins clash.

They are made on demand in .venv-conformance/ and used again until their pins change.
"""

import fcntl
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# Without byte code: of most of what is installed, nothing is ever imported.
PIP = ("pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check")
FOLDER = ROOT / ".venv-conformance"


class SetupFailed(Exception):
    """An environment could not be made; the message is pip's last line."""


def prepare(name: str) -> Path:
    """The Python of one environment. Raises SetupFailed."""
    requirements = HERE / f"requirements-{name}.txt"
    expected = hashlib.sha256(sys.version.encode() + requirements.read_bytes()).hexdigest()
    env = FOLDER / name
    FOLDER.mkdir(exist_ok=True)
    with (FOLDER / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two tests may need it at once, and both would make it
        stamp = env / "made-of"
        if not stamp.exists() or stamp.read_text() != expected:
            print(f"Setting up {env.relative_to(ROOT)} (once) …", file=sys.stderr, flush=True)
            shutil.rmtree(env, ignore_errors=True)
            _run(sys.executable, "-m", "venv", env)
            _run(env / "bin" / "python", "-m", *PIP, "-r", requirements)
            stamp.write_text(expected)  # last: a set-up that was interrupted starts over
    return env / "bin" / "python"


def _run(*command: object) -> None:
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        errors = [line for line in lines if line.startswith("ERROR")]
        raise SetupFailed((errors or lines)[-1])
