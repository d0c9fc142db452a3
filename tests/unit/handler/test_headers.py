"""Traces and queue times: taken if they are what they should be, else ignored."""

from math import inf

import pytest

from handler.errors import MalformedRequest
from handler.headers import read_deadline, read_queue_seconds, read_traceparent

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
NOW = 1_800_000_000.5


@pytest.mark.parametrize("version", ["00", "01", "fe"])
def test_a_traceparent_of_the_standard_is_taken(version: str) -> None:
    text = f"{version}-{TRACE}-{PARENT}-01"
    assert read_traceparent({"traceparent": text}) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-1",
        f"00-{TRACE}-{PARENT}-01\n",
        f"00-{TRACE}-{PARENT}-01-more",
        f" 00-{TRACE}-{PARENT}-01",
        "\U0001d7ce" * 55,
    ],
)
def test_any_other_is_dropped(text: str) -> None:
    assert read_traceparent({"traceparent": text}) is None


def test_no_header_is_nothing() -> None:
    assert read_traceparent({}) is None
    assert read_queue_seconds({}, NOW) is None


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("t=1800000000.000", 0.5), ("t=1800000000", 0.5), ("t=1799996401", 3599.5)],
)
def test_queue_seconds(text: str, seconds: float) -> None:
    assert read_queue_seconds({"x-request-start": text}, NOW) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "t=",
        "1800000000",
        "t=1800000001",  # in the future
        "t=1799996000",  # more than an hour ago
        "t=-5",
        "t=nan",
        "t=1800000000000",  # milliseconds
        "t=1800000000\n",
        "t=" + "9" * 400,
        "t=\u0661\u0668\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0660",
    ],
)
def test_nonsense_is_no_queue(text: str) -> None:
    assert read_queue_seconds({"x-request-start": text}, NOW) is None


# --- How long a client waits


def test_without_the_header_there_is_no_deadline() -> None:
    assert read_deadline({"x-request-start": f"t={NOW - 9}"}, NOW) == inf
    assert read_deadline({"x-request-timeout": " "}, NOW) == inf


@pytest.mark.parametrize(("text", "seconds"), [("2", 2), ("2.5", 2.5), (" 0.001 ", 0.001)])
def test_the_deadline_counts_from_the_gateway(text: str, seconds: float) -> None:
    headers = {"x-request-timeout": text}
    assert read_deadline(headers, NOW) == pytest.approx(NOW + seconds)
    headers["x-request-start"] = f"t={NOW - 9}"
    assert read_deadline(headers, NOW) == pytest.approx(NOW - 9 + seconds)


@pytest.mark.parametrize("text", ["soon", "-1", "1e3", "inf", "nan", "1.", "0x10", "1 2", "\u0661"])
def test_another_deadline_is_refused(text: str) -> None:
    with pytest.raises(MalformedRequest, match=r"must be a number of seconds, such as 2\.5"):
        read_deadline({"x-request-timeout": text}, NOW)
