"""A server with a script of its own: what it answers for an image, each time that it comes."""

import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Says = tuple[int, dict[str, Any] | bytes, dict[str, str]]  # status, body, headers


def success(label: str = "cat", confidence: float = 0.75) -> Says:
    answer = {
        "status": "success",
        "predictions": [
            {"class": label, "class_id": 3, "confidence": confidence},
            {"class": "dog", "class_id": 4, "confidence": 0.1},
        ],
        "metadata": {
            "image_size": [64, 48],
            "inference_time": 0.01,
            "model": "m",
            "version": "1.0",
            "weights": "w",
        },
    }
    return 200, answer, {}


def failure(code: int, kind: str, **headers: str) -> Says:
    body = {"status": "error", "code": code, "type": kind, "message": f"{kind} it is"}
    return code, body, {name.replace("_", "-"): value for name, value in headers.items()}


class Service:
    """Where it is, and when each image was asked about."""

    def __init__(self, says: Callable[[bytes, int], Says | None]) -> None:
        """`says` gets an image and which time it comes, from 1; None breaks the connection."""
        self.asked: dict[bytes, list[float]] = defaultdict(list)
        self.keys: set[str | None] = set()
        lock = threading.Lock()
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                image = body.split(b"\r\n\r\n")[-1].rpartition(b"\r\n--")[0]
                with lock:
                    service.asked[image].append(time.monotonic())
                    service.keys.add(self.headers["X-API-Key"])
                    said = says(image, len(service.asked[image]))
                if said is None:
                    self.close_connection = True
                    return
                status, answer, headers = said
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(data))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: object) -> None:
                """Nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@contextmanager
def serving(says: Callable[[bytes, int], Says | None]) -> Iterator[Service]:
    service = Service(says)
    thread = threading.Thread(target=service.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield service
    finally:
        service.server.shutdown()
        service.server.server_close()
        thread.join()
