"""The worker's log: one JSON object a line."""

import json
import logging
from collections.abc import Iterable
from datetime import datetime, timezone
from time import time
from typing import Any, NamedTuple

from ts.metrics import caching_metric

# Its level is the setting log_level; TorchServe's root logger is at INFO whatever that says.
_logger = logging.getLogger("classifier")


def set_level(name: str) -> None:
    """From now on, write no lines below "info", "warning" or "error"."""
    _logger.setLevel(name.upper())


class Line(NamedTuple):
    """What a line says."""

    time: float  # Unix
    level: int
    facts: dict[str, Any]


def quiet_torchserve() -> None:
    """Stop TorchServe's worker from writing a line for each batch.

    Its errors stay, and so do the metrics, which are lines of a logger of their own.
    """
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger(caching_metric.__name__).setLevel(logging.INFO)


def silence_torchserve() -> None:
    """Stop TorchServe's worker from writing tracebacks of a failure that our own line tells."""
    logging.getLogger().setLevel(logging.CRITICAL)


def log_line(level: int, event: str, **facts: Any) -> None:
    """One JSON object on one line of the worker's stdout, which TorchServe passes on.

    ASCII only: TorchServe's reader would break a line at U+2028.
    """
    log_lines(event, [Line(time(), level, facts)])


def log_lines(event: str, lines: Iterable[Line]) -> None:
    """As many lines of an event, in one write."""
    allowed = [line for line in lines if _logger.isEnabledFor(line.level)]
    if allowed:
        text = "\n".join(_encode(event, line) for line in allowed)
        _logger.log(max(line.level for line in allowed), text)


def _encode(event: str, line: Line) -> str:
    when = datetime.fromtimestamp(line.time, timezone.utc).isoformat(timespec="milliseconds")
    head = {"time": when, "level": logging.getLevelName(line.level), "event": event}
    return json.dumps(head | line.facts)
