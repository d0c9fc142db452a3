"""An environment for each peer, because their pins clash.

Each sees the packages of the environment that runs the benchmark, so all share one torch.
"""

import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

FOLDER = Path(__file__).parent / ".envs"
PEERS = Path(__file__).parent / "peers"


class SetupFailed(Exception):
    """A peer's environment could not be made; the message is pip's last line."""


def requirements_of(name: str) -> Path:
    return PEERS / f"requirements-{name}.txt"


def prepare(name: str) -> Path:
    """The Python of a peer's environment, made anew if the pins changed. Raises SetupFailed."""
    requirements = requirements_of(name)
    shared = shared_packages()
    expected = hashlib.sha256(
        f"{sys.version}{shared}{requirements.read_text()}".encode()
    ).hexdigest()
    env = FOLDER / name
    stamp = env / "made-of"
    if not stamp.exists() or stamp.read_text() != expected:
        shutil.rmtree(env, ignore_errors=True)
        _run(sys.executable, "-m", "venv", env)
        site = next(env.glob("lib/python*/site-packages"))
        (site / "shared.pth").write_text(f"{shared}\n")
        _run(env / "bin" / "python", "-m", "pip", "install", "--quiet", "-r", requirements)
        stamp.write_text(expected)
    return env / "bin" / "python"


def missing_packages(*requirements: Path) -> list[str]:
    """What requirements files pin and this Python has not, in whatever version."""
    text = "".join(path.read_text("utf-8") for path in requirements)
    missing = []
    for name in dict.fromkeys(re.findall(r"^([\w.-]+)==", text, re.MULTILINE)):
        try:
            version(name)
        except PackageNotFoundError:
            missing.append(name)
    return missing


def shared_packages() -> Path:
    """The folder that holds torch and everything else that serving needs."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SetupFailed("torch is not installed: run ./scripts/test once")
    return Path(spec.origin).parents[1]


def _run(*command: object) -> None:
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        errors = [line for line in lines if line.startswith("ERROR")]
        raise SetupFailed((errors or lines)[-1])
