"""The worker's log: one JSON object a line."""

import json
import logging
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from typing import Any

from ts.metrics import caching_metric
from ts.service import PREDICTION_METRIC

# Its level is the setting log_level; TorchServe's root logger is at INFO whatever that says.
_logger = logging.getLogger("classifier")


def set_level(name: str) -> None:
    """From now on, write no lines below "info", "warning" or "error"."""
    _logger.setLevel(name.upper())


def quiet_torchserve() -> None:
    """Leave of what TorchServe's worker writes for each batch nothing but errors.

    Through the root logger goes a line that the batch has come; through that of the metrics, beside
    the handler's own, how long it took, which its frontend has no use for.
    """
    logging.getLogger().setLevel(logging.WARNING)
    metrics = logging.getLogger(caching_metric.__name__)
    metrics.setLevel(logging.INFO)
    metrics.addFilter(lambda record: f"]{PREDICTION_METRIC}." not in record.msg)


def log_line(level: int, event: str, **facts: Any) -> None:
    """One JSON object on one line of the worker's stdout, which TorchServe passes on.

    ASCII only: TorchServe's reader would break a line at U+2028.
    """
    log_lines(event, [(level, facts)])


def log_lines(event: str, lines: Iterable[tuple[int, Mapping[str, Any]]]) -> None:
    """As many lines of an event, each with its level and facts, in one write."""
    allowed = [(level, facts) for level, facts in lines if _logger.isEnabledFor(level)]
    if allowed:
        time = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        texts = (
            json.dumps({"time": time, "level": logging.getLevelName(level), "event": event} | facts)
            for level, facts in allowed
        )
        _logger.log(max(level for level, _ in allowed), "\n".join(texts))
