"""Servers that stand in for TorchServe, with one answer to everything."""

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress


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
def torchserve_that(answer: bytes | None) -> Iterator[str]:
    """A server that gives this answer to everything, or, with None, never one."""
    held = ExitStack()

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            held.enter_context(connection)
            if answer is not None:
                with suppress(OSError):  # the client is gone
                    connection.recv(65536)
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
