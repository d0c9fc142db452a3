"""The clients of a campaign: a bounded number, each with one request after the other."""

import asyncio
import random
import threading
from collections.abc import Callable, Coroutine, Mapping
from itertools import count
from typing import Any

from service.chaos.client import Connection, Reply
from service.chaos.history import Attempt, History
from service.chaos.requests import Mixture, Request, read_answer

CLIENTS = 8
PAUSE_SECONDS = 0.6  # on average, between two requests of a client
ANSWER_SECONDS = 90  # for which a client waits: longer than any answer may take
RETRY_SECONDS = 0.3  # until a request whose connection broke off is sent again
MAX_ATTEMPTS = 60
KEPT = 0.5  # the share of answers after which the connection is used again


class Traffic:
    """Clients in a thread of their own, from the begin to the end of a context."""

    def __init__(self, history: History, port: int, mixture: Mixture, seed: int) -> None:
        self.history = history
        self.port = port
        self.mixture = mixture
        self.key = ""  # may be changed at any time
        self._seed = seed
        self._numbers = count()
        self._ended = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="traffic", daemon=True)

    def __enter__(self) -> "Traffic":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Every client ends when it has its answer."""
        self._ended = True
        self._thread.join(ANSWER_SECONDS + 10)

    def _run(self) -> None:
        async def clients() -> None:
            await asyncio.gather(*(self._client(client) for client in range(CLIENTS)))

        self._loop.run_until_complete(clients())

    def burst(self, clients: int, make: Callable[[Mixture, random.Random, int], Request]) -> None:
        """Send so many requests at once, each on its own connection, and wait for their answers."""

        async def send() -> None:
            rng = random.Random(self._seed)  # noqa: S311 no secret
            made = [(number := next(self._numbers), make(self.mixture, rng, number))
                    for _ in range(clients)]  # fmt: skip
            await asyncio.gather(*(self._send(number, request) for number, request in made))

        self._wait(send())

    def ask(self, request: Request, key: str) -> int:
        """The status of one request that is no part of the history; 0: no answer."""

        async def send() -> int:
            try:
                connection = await Connection.open(self.port)
            except OSError:
                return 0
            try:
                answer = connection.ask(request, {"X-API-Key": key})
                return (await asyncio.wait_for(answer, ANSWER_SECONDS)).status
            except (OSError, asyncio.TimeoutError):
                return 0
            finally:
                connection.close()

        return self._wait(send())

    def _wait(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(2 * ANSWER_SECONDS)

    async def _client(self, client: int) -> None:
        rng = random.Random(f"{self._seed} {client}")  # noqa: S311 no secret
        kept: Connection | None = None
        while not self._ended:
            number = next(self._numbers)
            kept = await self._send(number, self.mixture.draw(rng, number), kept)
            if kept and rng.random() > KEPT:
                kept.close()
                kept = None
            await asyncio.sleep(rng.uniform(0, 2 * PAUSE_SECONDS))
        if kept:
            kept.close()

    async def _send(
        self, number: int, request: Request, kept: Connection | None = None
    ) -> Connection | None:
        """Until there is an answer; the connection if it can be used again."""
        for attempt in range(1, MAX_ATTEMPTS + 1):
            connection, attempted = await self._attempt(number, attempt, request, kept)
            self.history.add(attempted)
            if attempted.status or not request.statuses:
                return connection
            kept = None
            await asyncio.sleep(RETRY_SECONDS)
        return None

    async def _attempt(
        self, number: int, attempt: int, request: Request, kept: Connection | None
    ) -> tuple[Connection | None, Attempt]:
        begin = self.history.now()
        seen: dict[str, Any] = {}
        connection = kept
        if connection and await connection.surplus():  # idle for too long; a client would see it
            connection.close()
            connection = None
        reply: Reply | None = None
        try:
            connection = connection or await Connection.open(self.port)
            if not request.statuses:
                await connection.send(request, self._headers(request))
            else:
                asking = connection.ask(request, self._headers(request))
                reply = await asyncio.wait_for(asking, ANSWER_SECONDS + request.seconds)
        except (OSError, asyncio.TimeoutError) as exc:
            seen["error"] = type(exc).__name__ + (f": {exc}" if str(exc) else "")
        took = seconds = self.history.now() - begin
        if reply:
            seconds = reply.seconds
            seen["status"] = reply.status
            seen["answer_id"] = reply.headers.get("x-request-id", "")
            seen["answered"], seen["reason"] = read_answer(reply.body)
        if connection and (not reply or reply.headers.get("connection") == "close"):
            connection.close()
            connection = None
        elif connection and (surplus := await connection.surplus()):
            seen["surplus"] = max(0, surplus)
            connection.close()
            connection = None
        return connection, Attempt(
            request=number,
            attempt=attempt,
            time=begin,
            sent=round(took - seconds, 3),
            seconds=round(seconds, 3),
            form=request.form,
            target=request.target,
            statuses=request.statuses,
            right=request.right,
            **seen,
        )

    def _headers(self, request: Request) -> Mapping[str, str]:
        return {"X-API-Key": self.key} if request.has_key else {}
