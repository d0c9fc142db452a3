"""Several generator processes against a small server that counts what it gets."""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from service.load.crew import Crew, share_out
from service.load.images import load_images
from service.load.measurement import Load

seen: Counter[bytes] = Counter()
peers: set[int] = set()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        seen[hashlib.sha256(body).digest()] += 1
        peers.add(self.client_address[1])
        label = "cat" if len(seen) % 2 else "dog"  # an image is now this, now that
        answer = json.dumps({"predictions": [{"class": label, "confidence": 0.9}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    thread.join()
    server.server_close()


def test_two_processes_are_one_load_and_send_nothing_twice(url: str) -> None:
    seen.clear()
    peers.clear()
    load = Load(concurrency=3, seconds=0.6, warmup_seconds=0.2)
    with Crew(2) as crew:
        run = crew.measure(url, load_images(None), load, classes=False)
        assert (run.concurrency, run.failed, run.refused) == (3, 0, 0)
        assert run.ok == run.requests > 10
        assert run.throughput_rps == pytest.approx(run.ok / 0.6, rel=0.2)
        assert len(peers) == 3  # a connection for each client
        assert max(seen.values()) == 1
        again = crew.measure(url, load_images(None), load, per_request=4)
    assert max(seen.values()) == 1
    assert set(again.failures) == {"WrongClass"}  # which classes=False has overlooked before


@pytest.mark.parametrize(
    ("clients", "processes", "expected"),
    [(8, 4, [2, 2, 2, 2]), (7, 3, [3, 2, 2]), (1, 4, [1]), (5, 1, [5])],
)
def test_clients_are_shared_out(clients: int, processes: int, expected: list[int]) -> None:
    assert share_out(clients, processes) == expected
