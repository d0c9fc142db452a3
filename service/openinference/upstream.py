"""The gateway as the gRPC server's upstream: V2 over REST, on a Unix socket."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import aiohttp
import grpc
import orjson

from service.openinference.callers import Refused
from service.openinference.rest import Body

CODES = {
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
BODY_TOO_LARGE = "RequestTooLarge"  # the gateway's own 413; the handler's are about images
TOLD = ("x-request-id", "x-model-version", "retry-after")  # of an answer, for the client
MAX_MESSAGE = 1000  # characters: clients take 8 KB of trailers
SLACK_SECONDS = 10  # until a gateway that does not keep its own limit in time is given up
TRIES = 2  # nginx may just have closed a connection that was kept; all requests may come twice
IDLE_SECONDS = 30  # until a connection is closed; nginx does so after 75
BINARY = "Inference-Header-Content-Length"


@dataclass(frozen=True)
class Reply:
    """What the gateway has answered."""

    status: int
    body: Body
    told: tuple[tuple[str, str], ...]  # for the client, as trailers

    @property
    def document(self) -> Any:
        return orjson.loads(self.body.data)

    def refuse(self) -> NoReturn:
        """Raises Refused, as the status and the body `{"error": "TYPE: message"}` say."""
        code = CODES.get(self.status)
        try:
            message = str(self.document["error"])
        except (ValueError, KeyError, TypeError):
            message = HTTPStatus(self.status).phrase
        if self.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE and message.startswith(
            BODY_TOO_LARGE
        ):
            code = grpc.StatusCode.RESOURCE_EXHAUSTED
        elif code is None:
            is_client = 400 <= self.status < 500
            code = grpc.StatusCode.INVALID_ARGUMENT if is_client else grpc.StatusCode.INTERNAL
        raise Refused(code, message[:MAX_MESSAGE], self.told, is_logged=True)


class Upstream:
    """Connections to the gateway, kept open; a context manager."""

    def __init__(self, path: Path, response_seconds: int) -> None:
        """`path` is the socket's, `response_seconds` what the gateway gives an answer."""
        self._path = path
        self._timeout = aiohttp.ClientTimeout(total=response_seconds + SLACK_SECONDS)

    async def __aenter__(self) -> "Upstream":
        self._session = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(
                str(self._path), limit=0, keepalive_timeout=IDLE_SECONDS
            ),
            timeout=self._timeout,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("Accept", "Accept-Encoding", "User-Agent"),
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._session.close()

    async def get(self, path: str, headers: Mapping[str, str]) -> Reply:
        return await self._ask("GET", path, headers, None)

    async def infer(self, path: str, headers: Mapping[str, str], body: Body) -> Reply:
        """The answer to V2 with binary tensors."""
        known = {"Content-Type": "application/octet-stream", BINARY: str(body.json_bytes)}
        return await self._ask("POST", path, {**headers, **known}, body.data)

    async def _ask(
        self, method: str, path: str, headers: Mapping[str, str], data: bytes | None
    ) -> Reply:
        """Raises Refused if the gateway does not answer."""
        for left in reversed(range(TRIES)):
            try:
                async with self._session.request(
                    method,
                    f"http://gateway{path}",
                    headers=headers,
                    data=data,
                    allow_redirects=False,
                ) as answer:
                    content = await answer.read()
                    length = answer.headers.get(BINARY, "")
                    told = [(name, answer.headers[name]) for name in TOLD if name in answer.headers]
                    size = int(length) if length.isdecimal() else len(content)
                    return Reply(answer.status, Body(content, size), tuple(told))
            except asyncio.TimeoutError:  # not the builtin one before Python 3.11
                raise Refused(
                    grpc.StatusCode.DEADLINE_EXCEEDED,
                    "Timeout: the gateway has not answered in time",
                ) from None
            except (aiohttp.ClientError, OSError) as exc:
                if not left:
                    raise Refused(
                        grpc.StatusCode.UNAVAILABLE, "Unavailable: the gateway does not answer"
                    ) from exc
        raise AssertionError("the last try returns or raises")
