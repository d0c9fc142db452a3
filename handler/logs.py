"""The worker's log: one JSON object a line."""

import json
import logging
from datetime import datetime, timezone
from typing import Any

# Its level is the setting log_level; TorchServe's root logger is at INFO whatever that says.
_logger = logging.getLogger("classifier")


def set_level(name: str) -> None:
    """From now on, write no lines below "info", "warning" or "error"."""
    _logger.setLevel(name.upper())


def log_line(level: int, event: str, **facts: Any) -> None:
    """One JSON object on one line of the worker's stdout, which TorchServe passes on.

    ASCII only: TorchServe's reader would break a line at U+2028.
    """
    if not _logger.isEnabledFor(level):
        return
    line = {
        "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        "level": logging.getLevelName(level),
        "event": event,
    }
    _logger.log(level, json.dumps(line | facts))
