"""Commands and what is printed about them."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Failed(Exception):
    """A check that did not hold."""


def run(*command: object, check: bool = True, show: bool = False) -> str:
    """stdout of a command; its stderr is shown if it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=not show, text=True, check=False)
    if check and done.returncode != 0:
        if not show:
            print(done.stdout, done.stderr, file=sys.stderr)
        raise Failed(f"{' '.join(words)} ended with status {done.returncode}")
    return (done.stdout or "").strip()


def say(what: str, fact: str) -> None:
    print(f"{what + ':':<22} {fact}", flush=True)


def check(what: str, holds: bool, seen: object) -> None:
    if not holds:
        raise Failed(f"{what}: {seen!r}")
    say("ok", what)


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Return once `condition()` is true; fail with `what` after that many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise Failed(what)
        time.sleep(0.2)
