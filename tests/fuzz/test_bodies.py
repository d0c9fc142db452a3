"""The short form: mutated bodies of V1 and V2, and that planted answers are found."""

import asyncio
from pathlib import Path

import pytest

from handler.errors import SetupError
from service.gateway.process import find_nginx
from tests import skip
from tests.fuzz.bodies import Sent, against_torchserve, judge
from tests.fuzz.http import report
from tests.server.serving import serving

REQUESTS = 1000


def test_no_body_gets_an_undeserved_answer(tmp_path: Path, colours: list[str], store: Path) -> None:
    try:
        find_nginx()
    except SetupError as exc:
        skip(str(exc))
    with serving(tmp_path, *colours, env={"TS_MODEL_STORE": str(store)}) as server:
        found = asyncio.run(against_torchserve(tmp_path, server, REQUESTS, seed=1))
    assert not found.wrong, report(found) + "\n".join(found.wrong)
    assert found.sent == REQUESTS
    assert found.statuses[200] > REQUESTS / 20
    assert found.statuses[400] > REQUESTS / 3


@pytest.mark.parametrize(
    ("protocol", "status", "content_type", "content", "wrong"),
    [
        ("V1", 200, "application/json", b'{"predictions": []}', ""),
        ("V1", 200, "application/json", b'{"outputs": []}', "an answer without predictions"),
        ("V1", 200, "application/octet-stream", b"", "tensors for an error"),
        ("V2", 200, "application/octet-stream", b"{}", ""),
        ("V2", 400, "application/octet-stream", b"{}", "tensors for an error"),
        ("V2", 400, "application/json", b'{"error": "MalformedRequest: no"}', ""),
        ("V2", 400, "application/json", b'{"message": "no"}', "an error without its text"),
        ("V2", 400, "text/html", b"<html>", "an answer that is no JSON"),
        ("V2", 503, "application/json", b'{"error": "Unavailable: no"}', "undeserved 503"),
    ],
)
def test_planted_answers_are_found(
    protocol: str, status: int, content_type: str, content: bytes, wrong: str
) -> None:
    assert judge(Sent(protocol, {}, b""), status, content_type, content) == wrong
