"""A small HTTP/1.1 client, for loads whose client must leave the cores to the server.

It sends each request in one piece, keeps connections open, and reads answers with a Content-Length,
as TorchServe and the gateway send them. A request costs it about half of what it costs aiohttp,
which the load generator uses otherwise.
"""

import asyncio
from typing import cast
from urllib.parse import urlsplit

from service.load.generator import Reply
from service.load.images import ImageRequest


class Wire:
    """Posts images to one http:// URL, over as many connections as requests at once."""

    def __init__(self, url: str, timeout_seconds: float) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        self._target = f"POST {parts.path or '/'} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
        self._timeout = timeout_seconds
        self._idle: list[_Connection] = []

    async def post(self, image: ImageRequest) -> Reply:
        """Raises OSError: the connection failed, or no answer came in time."""
        head = f"Content-Type: {image.content_type}\r\nContent-Length: {len(image.body)}"
        request = f"{self._target}{head}\r\n\r\n".encode() + image.body
        connection = await self._connect()
        reply = await connection.send(request, self._timeout)
        if reply[1].get("connection", "").lower() == "close":
            connection.close()
        else:
            self._idle.append(connection)
        return reply

    async def _connect(self) -> "_Connection":
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
        loop = asyncio.get_running_loop()
        _, opened = await loop.create_connection(_Connection, self._host, self._port)
        return opened

    def close(self) -> None:
        for connection in self._idle:
            connection.close()


class _Connection(asyncio.Protocol):
    """One connection with at most one request in flight."""

    _transport: asyncio.Transport

    def __init__(self) -> None:
        self.is_open = False
        self._received = bytearray()
        self._reply: asyncio.Future[Reply] | None = None

    async def send(self, request: bytes, timeout_seconds: float) -> Reply:
        loop = asyncio.get_running_loop()
        self._reply = loop.create_future()
        late = loop.call_later(timeout_seconds, self._fail, TimeoutError("no answer in time"))
        self._transport.write(request)
        try:
            return await self._reply
        except OSError:
            self.close()  # an answer that is still to come would be taken for the next one
            raise
        finally:
            late.cancel()

    def close(self) -> None:
        self.is_open = False
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.is_open = True

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, rest = self._received.partition(b"\r\n\r\n")
        if not end or self._reply is None or self._reply.done():
            return
        status, *lines = head.decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in lines)
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        length = headers.get("content-length", "")
        if not length.isdigit():
            self._fail(OSError("the answer has no Content-Length"))
        elif len(rest) >= int(length):
            self._received.clear()
            self._reply.set_result((int(status.split()[1]), headers, bytes(rest)))

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        self._fail(exc or ConnectionResetError("closed without an answer"))

    def _fail(self, exc: Exception) -> None:
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(exc)
