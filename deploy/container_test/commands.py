"""Commands and what is printed about them."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Failed(Exception):
    """A check that did not hold."""


def run(*command: object, check: bool = True, show: bool = False) -> str:
    """stdout of a command; its stderr is shown if it fails."""
    done = subprocess.run(
        [str(word) for word in command],
        stdout=None if show else subprocess.PIPE,
        stderr=None if show else subprocess.PIPE,
        text=True,
        check=False,
    )
    if check and done.returncode != 0:
        if not show:
            print(done.stdout, done.stderr, file=sys.stderr)
        raise Failed(f"{' '.join(map(str, command))} ended with status {done.returncode}")
    return (done.stdout or "").strip()


def say(what: str, fact: str) -> None:
    print(f"{what + ':':<22} {fact}", flush=True)


def check(what: str, holds: bool, seen: object) -> None:
    if not holds:
        raise Failed(f"{what}: {seen!r}")
    say("ok", what)
