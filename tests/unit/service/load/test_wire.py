"""The small HTTP client against a server of our own."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from aiohttp import web

from service.load.generator import Reply
from service.load.images import ImageRequest
from service.load.wire import Wire
from tests.unit.service.load.test_generator import serve

IMAGES = [ImageRequest("a.jpg", b"a"), ImageRequest("b.jpg", b"b" * 300_000)]


def post(
    respond: Callable[[bytes], Awaitable[web.StreamResponse]], timeout_seconds: float = 5
) -> list[Reply | str]:
    """What became of each image, sent one after the other and then together."""

    async def one(wire: Wire, image: ImageRequest) -> Reply | str:
        try:
            return await wire.post(image)
        except OSError as exc:
            return type(exc).__name__

    async def ask(url: str) -> list[Reply | str]:
        wire = Wire(url, timeout_seconds)
        try:
            alone = [await one(wire, image) for image in IMAGES]
            return alone + await asyncio.gather(*(one(wire, image) for image in IMAGES))
        finally:
            wire.close()

    replies: list[Reply | str] = asyncio.run(serve(respond, ask))  # type: ignore[arg-type]
    return replies


@pytest.mark.parametrize("headers", [{}, {"Connection": "close"}])
def test_answers_come_whole_and_to_whom_they_belong(headers: dict[str, str]) -> None:
    async def respond(body: bytes) -> web.Response:
        await asyncio.sleep(0.05 if body == b"a" else 0)  # so that b overtakes a
        return web.Response(status=503 if body == b"a" else 200, body=body, headers=headers)

    expected = [(503, IMAGES[0].body), (200, IMAGES[1].body)] * 2
    assert [(reply[0], reply[2]) for reply in post(respond)] == expected


def test_what_cannot_be_read_is_a_failure_of_its_own_request() -> None:
    async def respond(body: bytes) -> web.StreamResponse:
        response = web.Response(body=b"fine")
        if body == b"a":
            response.enable_chunked_encoding()
        return response

    kinds = [reply if isinstance(reply, str) else reply[2] for reply in post(respond)]
    assert kinds == ["OSError", b"fine"] * 2


def test_a_late_answer_is_given_to_nobody() -> None:
    async def respond(body: bytes) -> web.Response:
        await asyncio.sleep(0.3 if body == b"a" else 0)
        return web.Response(body=body[:1])

    kinds = [reply if isinstance(reply, str) else reply[2] for reply in post(respond, 0.1)]
    assert kinds == ["TimeoutError", b"b"] * 2
