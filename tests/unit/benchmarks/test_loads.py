"""Overload and pairs of loads, on a small server in a process of its own."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import overload, pairs
from benchmarks.costs import p50_cost, rate_cost
from benchmarks.servers import Started
from service.load.images import ImageRequest
from service.load.measurement import Sample
from service.load.processes import free_base_port, running

SERVER = """
import http.server, json, sys, threading, time

free = threading.Semaphore(2)   # answered at once
room = threading.Semaphore(8)   # and waiting
GOOD = json.dumps({"predictions": [{"class": "cat", "confidence": 0.9}]}).encode()

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        if room.acquire(blocking=False):
            with free:
                time.sleep(0.01 if self.headers["X-Probe"] else 0.03)
            room.release()
            self.answer(200, GOOD)
        else:
            self.answer(503, b"full")

    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
print("up", flush=True)
server.serve_forever()
"""
IMAGES = [ImageRequest("a.jpg", b"a")]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Started]:
    port = free_base_port()
    with running([sys.executable, "-c", SERVER, port], {}, tmp_path) as server:
        deadline = time.monotonic() + 10
        while "up" not in server.log.read_text() and time.monotonic() < deadline:
            time.sleep(0.01)
        yield Started(server, f"http://127.0.0.1:{port}/", "", 0.0, {})


def test_overload_is_answered_refused_and_over(
    target: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overload, "TIMES", (4,))
    monkeypatch.setattr(overload, "WARMUP_SECONDS", 0.2)
    monkeypatch.setattr(overload, "RECOVERY_SECONDS", 1.5)
    (run,) = overload.measure_overload(target, IMAGES, 4, 0.8)
    assert run["times"] == 4
    assert run["rate"] == 4 * run["best_rps"]
    assert run["best_rps"] <= 67  # two at a time, 30 ms each
    assert run["failed"] == run["after_failed"] == 0
    assert run["ok"] + run["refused"] == run["requests"] == pytest.approx(0.8 * run["rate"], abs=1)
    assert run["throughput_rps"] <= 70
    assert run["refused"] > run["ok"]
    assert run["refused_p50_ms"] < run["p50_ms"]
    assert len(run["after_rps"]) == 6
    assert sum(run["after_rps"]) > 0


def test_the_cost_of_a_header_is_found_on_one_server(target: Started) -> None:
    pair = pairs.measure_pair(target, pairs.without_metrics(target), IMAGES, 1, 0.8)
    assert pair["with"]["failed"] == pair["without"]["failed"] == 0
    cost = p50_cost(pair)
    assert cost is not None
    assert 15 <= cost <= 40  # 30 ms against 10 ms
    lost = rate_cost(pair)
    assert lost is not None
    assert 30 <= lost <= 80


def test_rates_in_slices_count_good_answers_after_the_end() -> None:
    ends = [9.9, 10.0, 10.1, 10.3, 13.9, 14.1]
    samples = [Sample(9.0, 9.0, ended=end, outcome="ok") for end in ends]
    samples.append(Sample(9.0, 9.0, ended=10.1, outcome="refused"))
    rates = overload.slice_rates(samples, 10.0)
    assert (rates[0], rates[1], rates[-1], sum(rates)) == (8.0, 4.0, 4.0, 16.0)


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([100.0] * 8, 0.0),
        ([0.0, 50.0, *[100.0] * 6], 0.5),
        ([0.0, 50.0, 150.0, 100.0, 100.0, 100.0], 0.25),  # 100 on average, from the second on
        ([200.0, 0.0, 0.0, 0.0, 90.0, 90.0, 90.0, 90.0], None),  # one good slice is no full speed
    ],
)
def test_full_speed(rates: list[float], expected: float | None) -> None:
    assert overload.full_speed_seconds(rates, 100.0) == expected
