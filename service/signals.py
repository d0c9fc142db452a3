"""The signals that stop a command."""

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any


def on_stop(handler: Callable[[int, FrameType | None], Any]) -> None:
    """Let Ctrl-C, SIGTERM and the end of the terminal do this, the last not under nohup."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)
