"""The load generator against a server of our own."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from aiohttp import web

from service.load.answers import Expectations
from service.load.generator import due_times, measure, send_once
from service.load.images import ImageRequest
from service.load.measurement import Load, Measurement

IMAGES = [ImageRequest("a.jpg", b"a"), ImageRequest("b.jpg", b"b")]
Respond = Callable[[bytes], Coroutine[Any, Any, web.Response]]


async def serve(respond: Respond, ask: Callable[[str], Coroutine[Any, Any, Any]]) -> Any:
    """What `ask` returns of the URL of a server that answers each body with `respond`."""

    async def handle(request: web.Request) -> web.Response:
        return await respond(await request.read())

    app = web.Application()
    app.router.add_post("/", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        return await ask(f"http://127.0.0.1:{runner.addresses[0][1]}/")
    finally:
        await runner.cleanup()


def run(respond: Respond, load: Load, **options: Any) -> Measurement:
    """Measure a server that answers each body with `respond`."""
    measurement = asyncio.run(serve(respond, lambda url: measure(url, IMAGES, load, **options)))
    assert isinstance(measurement, Measurement)
    return measurement


def good(body: bytes) -> web.Response:
    label = f"class {body.decode()}"
    return web.json_response({"predictions": [{"class": label, "confidence": 0.9}]})


def test_an_open_loop_is_due_evenly() -> None:
    assert list(due_times(10.0, 11.0, 4)) == [10.0, 10.25, 10.5, 10.75]


def test_closed_loop() -> None:
    async def respond(body: bytes) -> web.Response:
        await asyncio.sleep(0.02)
        return good(body)

    result = run(respond, Load(concurrency=4, seconds=0.4, warmup_seconds=0.1))
    assert result.failed == result.refused == 0
    assert 20 <= result.ok <= 80  # 4 clients, 20 ms each: 80 at best
    assert result.p50_ms is not None
    assert result.p50_ms >= 20
    assert result.sent_bytes == result.requests
    assert result.received_bytes > 0
    assert 0 < result.generator_cpu_percent <= 150


def test_failures_by_kind_and_refusals_apart() -> None:
    asked = 0

    async def respond(body: bytes) -> web.Response:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0.002)
        return [
            good(body),
            web.Response(status=503),
            web.Response(status=500),
            web.Response(text="<html>"),
            web.json_response({"predictions": []}),
            good(b"another image"),
        ][asked % 6]

    expectations = Expectations({"a.jpg": "class a", "b.jpg": "class b"})
    result = run(respond, Load(concurrency=1, seconds=0.3), expectations=expectations)
    assert result.ok > 0
    assert result.refused > 0
    assert result.refused_p50_ms is not None
    assert set(result.failures) == {"HTTP 500", "NoJSON", "NoPredictions", "WrongClass"}
    assert result.failed == sum(result.failures.values())


def test_an_open_loop_does_not_hide_a_stall() -> None:
    """The server stands still for 0.3 s once; the requests due meanwhile have waited."""
    stalled = False

    async def respond(body: bytes) -> web.Response:
        nonlocal stalled
        if not stalled:
            stalled = True
            time.sleep(0.3)  # the whole loop, client included
        return good(body)

    result = run(respond, Load(rate=100, seconds=0.6))
    assert result.requests == 60
    assert result.failed == 0
    assert result.p99_ms is not None
    assert result.p99_ms >= 250
    assert result.p50_ms is not None
    assert result.p50_ms < result.p99_ms
    # Half of the requests were due during the stall: a closed loop would have seen one slow one.
    assert result.mean_ms is not None
    assert result.mean_ms > 30
    assert result.start_lag_p99_ms is not None
    assert result.start_lag_p99_ms > 100  # and the generator says that it was late itself


def test_nobody_listens(closed_port: int) -> None:
    load = Load(concurrency=1, seconds=0.1)
    result = asyncio.run(measure(f"http://127.0.0.1:{closed_port}/", IMAGES, load))
    assert result.ok == 0
    assert result.failures.keys() == {"ClientConnectorError"}
    assert result.p50_ms is None


def test_a_server_that_says_nothing_is_given_up(silent_port: int) -> None:
    load = Load(concurrency=1, seconds=0.1)
    url = f"http://127.0.0.1:{silent_port}/"
    result = asyncio.run(measure(url, IMAGES, load, timeout_seconds=0.3))
    assert result.failed == 1
    assert result.ok == 0


def test_each_image_is_sent_once() -> None:
    async def respond(body: bytes) -> web.Response:
        return good(body) if body == b"a" else web.Response(status=500)

    expectations = Expectations()
    samples = asyncio.run(
        serve(respond, lambda url: send_once(url, IMAGES, clients=4, expectations=expectations))
    )
    assert [sample.outcome for sample in samples] == ["ok", "HTTP 500"]
    assert expectations.top_classes == {"a.jpg": "class a"}
