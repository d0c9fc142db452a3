"""One connection of a client, which sees more of it than a library would show.

Whether bytes follow an answer, what a server says while the body is still being sent, bodies that
are sent slowly, and clients that hang up.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from service.chaos.requests import Request

PIECES = 10  # of a body that is sent slowly
SURPLUS_SECONDS = 0.005  # for which a client looks whether more follows


class Reply(NamedTuple):
    status: int
    headers: Mapping[str, str]  # names in lower case
    body: bytes
    seconds: float  # since the last byte was sent


@dataclass
class Connection:
    """A connection to HOST:PORT. Every method raises OSError."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    sent: float = 0.0  # when the last piece was, by the loop's clock

    @classmethod
    async def open(cls, port: int) -> "Connection":
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def ask(self, request: Request, headers: Mapping[str, str]) -> Reply:
        """The answer, perhaps while the body is still being sent."""
        loop = asyncio.get_running_loop()
        sending = asyncio.create_task(self.send(request, headers))
        try:
            status, answered, body = await self._receive()
        except (asyncio.IncompleteReadError, ValueError) as exc:
            raise ConnectionError(f"broke off after {exc!r}") from exc
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
        return Reply(status, answered, body, loop.time() - self.sent)

    async def send(self, request: Request, headers: Mapping[str, str]) -> None:
        """The request, as slowly and as far as it is to be sent."""
        loop = asyncio.get_running_loop()
        self.sent = loop.time()
        body = request.body
        lines = [f"{request.method} {request.target} HTTP/1.1", "Host: campaign"]
        lines += [f"{name}: {value}" for name, value in {**headers, **request.headers}.items()]
        if request.method != "GET":
            lines.append(f"Content-Length: {len(body)}")
        self.writer.write("\r\n".join([*lines, "", ""]).encode())
        body = body[: int(len(body) * request.share)]
        size = max(1, -(-len(body) // PIECES)) if request.seconds else max(1, len(body))
        for begin in range(0, len(body), size):
            await asyncio.sleep(request.seconds / PIECES)
            self.writer.write(body[begin : begin + size])
            self.sent = loop.time()
            await self.writer.drain()

    async def _receive(self) -> tuple[int, dict[str, str], bytes]:
        head = await self.reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").rstrip().split("\r\n")
        pairs = (line.partition(":") for line in lines)
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        if "content-length" in headers:
            body = await self.reader.readexactly(int(headers["content-length"]))
        elif headers.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(await self.reader.readuntil(b"\r\n"), 16):
                body += (await self.reader.readexactly(size + 2))[:-2]
            await self.reader.readexactly(2)
        else:
            body = await self.reader.read()
        return int(first.split()[1]), headers, body

    async def surplus(self) -> int:
        """How many bytes follow the answer; -1 if the server has closed the connection."""
        try:
            more = await asyncio.wait_for(self.reader.read(2**16), SURPLUS_SECONDS)
        except asyncio.TimeoutError:
            return 0
        except OSError:
            return -1
        return len(more) or -1

    def close(self) -> None:
        self.writer.transport.abort()
