"""Clients that keep connections, and send next to nothing on them."""

import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.gateway.clients import RED, TIMEOUT, best, client
from tests.gateway.conftest import Served
from tests.gateway.running import running, settings
from tests.processes import wait_for

DRIP_SECONDS = 60  # at most: a test that fails must end, too


def drip(port: int, stop: threading.Event, connections: int, address: str, length: int) -> float:
    """Bodies of which a byte comes now and then; gives the seconds until all were cut off."""
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n"
    started = time.monotonic()
    with ExitStack() as held:
        left = []
        for _ in range(connections):
            connection = held.enter_context(socket.socket())
            connection.bind((address, 0))
            connection.connect(("127.0.0.1", port))
            connection.sendall(head.encode() + b"x")
            connection.settimeout(0)
            left.append(connection)
        while left and not stop.wait(0.2) and time.monotonic() - started < DRIP_SECONDS:
            for connection in [*left]:
                try:
                    connection.sendall(b"x")
                    cut = connection.recv(4096) == b""
                except BlockingIOError:
                    cut = False
                except OSError:
                    cut = True
                if cut:
                    left.remove(connection)
        return time.monotonic() - started


def test_200_slow_connections_do_not_harm_a_fast_client(gateway: Served, tmp_path: Path) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
    env = settings([gateway.server], client_timeout_seconds="2")
    with running(tmp_path, env) as other, ExitStack() as held:
        slow: list[socket.socket] = []
        for number in range(200):
            connection = held.enter_context(socket.socket())
            connection.bind((f"127.0.1.{number % 100 + 1}", 0))
            connection.connect(("127.0.0.1", other.port))
            connection.sendall(head if number % 2 else head[:30])
            slow.append(connection)
        fast = client("127.0.0.1")
        started = time.monotonic()
        for _ in range(20):
            assert best(fast.post(f"{other.url}/predict", data=RED, timeout=TIMEOUT)) == "red"
        assert time.monotonic() - started < 20
        assert fast.get(f"{other.url}/health", timeout=TIMEOUT).status_code == 200
        for connection in slow:  # nobody is kept for good
            connection.settimeout(TIMEOUT)
            with suppress(ConnectionResetError):
                while connection.recv(4096):
                    pass


def test_a_dripped_body_is_bounded_in_time(gateway: Served, tmp_path: Path) -> None:
    env = settings([gateway.server], body_timeout_seconds="2", client_timeout_seconds="30")
    with running(tmp_path, env) as other:
        seconds = drip(other.port, threading.Event(), 4, "127.0.0.1", 1000)
        assert 1.5 < seconds < 10
        wait_for(lambda: len(other.lines()) == 4)
        assert {line["status"] for line in other.lines()} == {408}


@pytest.mark.parametrize("length", [1000, 16 * 2**20])
def test_slow_bodies_lock_nobody_out(gateway: Served, tmp_path: Path, length: int) -> None:
    """Four clients with 64 connections each, and, as behind a proxy, one more with all of them."""
    stop = threading.Event()
    with running(tmp_path, settings([gateway.server])) as other, ThreadPoolExecutor(4) as pool:
        try:
            for number in range(4):
                pool.submit(drip, other.port, stop, 64, f"127.0.0.{number + 2}", length)
            time.sleep(1)
            for address in ("127.0.0.9", "127.0.0.2"):
                fast = client(address)
                statuses = Counter(
                    fast.post(f"{other.url}/predict", data=RED, timeout=TIMEOUT).status_code
                    for _ in range(100)
                )
                assert statuses == {200: 100}
        finally:
            stop.set()


def test_a_dripped_head_is_bounded_in_time(gateway: Served, tmp_path: Path) -> None:
    def drip(connection: socket.socket) -> None:
        for byte in b"GET / HTTP/1.1\r\nHost: " + b"x" * 1000:
            connection.sendall(bytes([byte]))
            time.sleep(0.1)

    with ExitStack() as stack:
        env = settings([gateway.server], client_timeout_seconds="2")
        other = stack.enter_context(running(tmp_path, env))
        connection = stack.enter_context(socket.create_connection(("127.0.0.1", other.port)))
        started = time.monotonic()
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            drip(connection)
        assert time.monotonic() - started < 15
