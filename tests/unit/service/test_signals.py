"""The signals that stop a command, sent to a process that heeds them."""

import subprocess
import sys

import pytest

from tests import ROOT

COMMAND = """
import signal, sys
from service.signals import on_stop
on_stop(lambda number, _: sys.exit(f"stopped by {number}"))
on_stop(lambda number, _: sys.exit(f"stopped by {number}"))  # as serve does, twice
signal.raise_signal(getattr(signal, sys.argv[1]))
sys.exit("goes on")
"""


@pytest.mark.parametrize(
    ("shell", "signal", "said"),
    [
        ("", "SIGHUP", "stopped by 1"),
        ("", "SIGINT", "stopped by 2"),
        ("", "SIGTERM", "stopped by 15"),
        ("trap '' HUP; ", "SIGHUP", "goes on"),  # what nohup does
        ("trap '' HUP; ", "SIGTERM", "stopped by 15"),
        ("trap '' INT; ", "SIGINT", "stopped by 2"),  # what a shell does to its background jobs
    ],
)
def test_signals(shell: str, signal: str, said: str) -> None:
    done = subprocess.run(
        ["bash", "-c", f'{shell}exec "$0" "$@"', sys.executable, "-c", COMMAND, signal],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert done.stderr.strip() == said
