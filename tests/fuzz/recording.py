"""A stand-in for TorchServe that takes nothing but what nginx should write, and keeps the rest."""

import asyncio
import hashlib
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from tests.gateway.upstreams import answer_of

# What deploy/gateway/proxy.conf sends.
HEADERS = {
    "content-type",
    "x-body-type",
    "host",
    "x-top-k",
    "x-protocol",
    "inference-header-content-length",
    "x-request-id",
    "x-request-start",
    "x-request-timeout",
    "traceparent",
    "tracestate",
    "content-length",
}
PATH = re.compile(rb"POST /predictions/[A-Za-z0-9][A-Za-z0-9_./-]* HTTP/1\.1")
WATCH = b"\r\nUser-Agent: python-requests/"  # service/gateway/watch.py, past nginx
LINE = re.compile(rb"([A-Za-z-]+): ([^\r\n\0]*)")


@dataclass
class Recording:
    """Where it listens, and each thing that was no such request."""

    address: str = ""
    faults: list[str] = field(default_factory=list)

    def read_head(self, head: bytes) -> dict[str, str]:
        first, *lines = head.split(b"\r\n")
        headers = {}
        if not PATH.fullmatch(first):
            self.faults.append(f"first line {first!r}")
        for line in lines:
            match = LINE.fullmatch(line)
            name = match[1].decode().lower() if match else ""
            if match is None or name not in HEADERS or name in headers:
                self.faults.append(f"header {line!r}")
            else:
                headers[name] = match[2].decode("latin-1")
        return headers


@asynccontextmanager
async def recording() -> AsyncIterator[Recording]:
    """A server that answers with the sha256 of each body, under the request's own id."""
    seen = Recording()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await read_until_end(reader):
                if WATCH in head:
                    writer.write(answer_of(b"{}"))
                    break
                headers = seen.read_head(head)
                length = headers.get("content-length", "0")
                if not re.fullmatch("[0-9]{1,9}", length):
                    seen.faults.append(f"length in {head!r}")
                    break
                body = await reader.readexactly(int(length))
                found = {"sha256": hashlib.sha256(body).hexdigest(), "length": len(body)}
                answer = answer_of(json.dumps(found).encode())
                marked = f"x-request-id: {headers.get('x-request-id', '')}\r\n\r\n".encode()
                writer.write(answer.replace(b"\r\n\r\n", b"\r\n" + marked, 1))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # nginx gave a request up, or the server is being closed
        finally:
            writer.close()

    async def read_until_end(reader: asyncio.StreamReader) -> bytes:
        try:
            return (await reader.readuntil(b"\r\n\r\n"))[:-4]
        except asyncio.IncompleteReadError as error:
            if error.partial:
                seen.faults.append(f"bytes that are no request: {error.partial!r}")
            return b""

    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=2**20, backlog=1024)
    seen.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield seen
    finally:
        server.close()
