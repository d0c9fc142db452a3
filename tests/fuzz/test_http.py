"""The short form: mutated requests through the gateway, and that faults planted there are found."""

import asyncio
from pathlib import Path

import pytest

from handler.errors import SetupError
from service.gateway.process import find_nginx
from tests import skip
from tests.fuzz.http import against_recording, against_torchserve, judge, report
from tests.fuzz.mutations import Mutated
from tests.fuzz.recording import Recording
from tests.server.serving import serving

REQUESTS = 3000
OUTER, INNER, TAIL = (f"{who}-000007" for who in ("outer", "inner", "tail"))
SENT = f"{OUTER} {INNER} {TAIL}".encode()


@pytest.fixture(scope="module", autouse=True)
def nginx() -> None:
    try:
        find_nginx()
    except SetupError as exc:
        skip(str(exc))


def test_nothing_is_smuggled(tmp_path: Path) -> None:
    found = asyncio.run(against_recording(tmp_path, REQUESTS, seed=1))
    assert not found.wrong, report(found) + "\n".join(found.wrong)
    assert found.sent == REQUESTS
    assert found.statuses[200] > REQUESTS / 3
    assert found.statuses[400] > REQUESTS / 5


def test_nothing_is_smuggled_to_torchserve(tmp_path: Path, colours: list[str], store: Path) -> None:
    with serving(tmp_path, *colours, env={"TS_MODEL_STORE": str(store)}) as server:
        found = asyncio.run(against_torchserve(tmp_path, server, REQUESTS // 3, seed=2))
    assert not found.wrong, report(found) + "\n".join(found.wrong)


def answer(who: str, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: 2\r\nX-Request-ID: {who}\r\n\r\n{{}}".encode()


@pytest.mark.parametrize(
    ("inner", "answers", "wrong"),
    [
        ("inside", [answer(OUTER), answer(TAIL)], ""),
        ("inside", [answer(OUTER), answer(INNER), answer(TAIL)], "expected answers to"),
        ("inside", [answer(OUTER)], "expected answers to"),
        ("inside", [answer(OUTER), answer(TAIL, "503 Service Unavailable")], "undeserved"),
        ("behind", [answer(OUTER), answer(INNER), answer(TAIL)], ""),
        ("refused", [answer("x", "400 Bad Request")], ""),
        ("refused", [answer(OUTER), answer(INNER)], "not refused"),
        ("unknown", [answer(TAIL), answer(OUTER)], "out of step"),
        ("unknown", [answer("outer-000008")], "the answer to outer-000008 came to 7"),
        ("inside", [answer(OUTER), b"HTTP/1.1 200 OK\r\nContent-Le"], "no answer"),
    ],
)
def test_planted_answers_are_found(inner: str, answers: list[bytes], wrong: str) -> None:
    mutated = Mutated(7, "planted", SENT, inner)  # type: ignore[arg-type]
    said = judge(mutated, b"".join(answers), in_time=True, echoes=True)
    assert said.startswith(wrong)
    assert bool(said) == bool(wrong)


def test_a_hang_is_found() -> None:
    mutated = Mutated(7, "planted", SENT, "unknown")
    assert judge(mutated, answer(OUTER), in_time=False, echoes=True).startswith("not done after")


GOOD = b"POST /predictions/m/1.0 HTTP/1.1\r\nHost: torchserve\r\nContent-Length: 3"


@pytest.mark.parametrize(
    ("head", "faults"),
    [
        (GOOD, 0),
        (GOOD.replace(b"/predictions/m", b"/models/m"), 1),
        (GOOD.replace(b"POST", b"GET"), 1),
        (GOOD.replace(b" HTTP", b" x HTTP"), 1),
        (GOOD + b"\r\nX: y", 1),
        (GOOD + b"\r\nhost: again", 1),
        (GOOD + b"\r\nX-Top-K: 3\rX: y", 1),
        (GOOD + b"\r\n folded", 1),
    ],
)
def test_what_nginx_should_not_write_is_a_fault(head: bytes, faults: int) -> None:
    seen = Recording()
    seen.read_head(head)
    assert len(seen.faults) == faults
