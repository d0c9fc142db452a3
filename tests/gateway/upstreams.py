"""Servers that stand in for TorchServe."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def answer_of(
    body: bytes, status: str = "200 OK", length: int | None = None, by_handler: bool = True
) -> bytes:
    """What a replica says. Its own errors, unlike the handler's answers, name no version.

    A `length` above the body's is that of an answer which breaks off.
    """
    version = "X-Model-Version: 1.0\r\n" if by_handler else ""
    length = length or len(body)
    head = f"HTTP/1.1 {status}\r\n{version}content-type: application/json\r\n"
    return f"{head}content-length: {length}\r\n\r\n".encode() + body


@contextmanager
def torchserve_that(answer: bytes | None, seen: list[bytes] | None = None) -> Iterator[str]:
    """A server that gives this answer to everything, or, with None, never one.

    The predictions of clients that it was sent are added to `seen`, and not the gateway's own.
    """
    held = ExitStack()
    received = [] if seen is None else seen

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            held.enter_context(connection)
            if answer is not None:
                with suppress(OSError):  # the client is gone
                    data = connection.recv(65536)
                    if data.startswith(b"POST") and b"X-Probe" not in data:
                        received.append(data)
                    connection.sendall(answer)
                    connection.shutdown(socket.SHUT_WR)

    with held, socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@contextmanager
def http_server(
    body_of: Callable[[BaseHTTPRequestHandler], bytes], address: tuple[str, int] = ("127.0.0.1", 0)
) -> Iterator[int]:
    """A server that answers 200 with this body, each request in a thread; gives its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = body_of(self)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815 - the name is http.server's

        def log_message(self, *args: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(address, Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()
