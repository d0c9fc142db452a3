"""Lines of the worker's log: one JSON object each, written together."""

import json
import logging
from typing import Any

import pytest

from handler.logs import Line, log_line, log_lines

INFO, WARNING, ERROR = logging.INFO, logging.WARNING, logging.ERROR


def decode(record: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in record.splitlines()]


def test_lines_of_several_requests_are_one_write(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(INFO, "classifier")
    lines = [Line(0.25, INFO, {"number": 1}), Line(1e9, ERROR, {"number": 2, "text": "鷺\u2028"})]
    log_lines("request", lines)
    [message] = caplog.messages
    assert message.isascii()
    assert decode(message) == [
        {
            "time": "1970-01-01T00:00:00.250+00:00",
            "level": "INFO",
            "event": "request",
            "number": 1,
        },
        {
            "time": "2001-09-09T01:46:40.000+00:00",
            "level": "ERROR",
            "event": "request",
            "number": 2,
            "text": "鷺\u2028",
        },
    ]


@pytest.mark.parametrize(
    ("level", "written"), [(INFO, [1, 2, 3]), (WARNING, [2, 3]), (ERROR, [3]), (ERROR + 1, [])]
)
def test_each_line_has_a_level_of_its_own(
    caplog: pytest.LogCaptureFixture, level: int, written: list[int]
) -> None:
    caplog.set_level(level, "classifier")
    levels = {1: INFO, 2: WARNING, 3: ERROR}
    log_lines("request", [Line(0, level, {"number": number}) for number, level in levels.items()])
    lines = [line for message in caplog.messages for line in decode(message)]
    assert [line["number"] for line in lines] == written
    assert len(caplog.messages) == (1 if written else 0)


def test_no_lines_are_no_write(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(INFO, "classifier")
    log_lines("request", [])
    log_line(INFO, "model_ready", model="birds")
    [message] = caplog.messages
    assert decode(message)[0]["event"] == "model_ready"
