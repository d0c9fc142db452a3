"""Watches which replicas answer, so that requests go to those that do.

TorchServe says READY while its Java is stopped, while a worker hangs, and while every prediction
fails. So a replica is asked for a sign of life each second, and for a real prediction now and then.
"""

import base64
import json
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from service.logs import Log
from service.torchserve.management import direct_session

ASK_SECONDS = 1.0  # between two checks
PING_TIMEOUT_SECONDS = 2.0
PREDICTION_SECONDS = 10.0  # between two predictions of a replica that answers them
PREDICTION_TIMEOUT_SECONDS = 10.0
FAILURES = 2  # in a row, until a replica is left out
SILENT = "does not answer"
TELL_SECONDS = 5.0  # between two reports to nginx, if nothing has changed

# Only the status is read: a body may be large, or arrive slowly.
PLAIN: Any = {"allow_redirects": False, "stream": True}

# A PNG of one grey pixel. The handler counts what has this header apart from clients' requests.
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mNoAAAAggCB2kUIOwAAAABJRU5ErkJggg=="
)
HEADERS = {"Content-Type": "application/octet-stream", "X-Body-Type": "image/png", "X-Probe": "1"}


@dataclass
class _Replica:
    """What is known of one replica."""

    failures: int = 0  # in a row
    reason: str = ""  # why it is left out; "": it is not
    predict_at: float = 0.0  # monotonic time of the next prediction
    asking: bool = False


def ask_prediction(address: str, model: str, timeout: float) -> str:
    """Ask TorchServe at IP:PORT for a real prediction; "" if it can answer, else what is wrong.

    A full queue is no failure: a replica that refuses is alive.
    """
    url = f"http://{address}/predictions/{model}"
    try:
        with direct_session() as session:
            answer = session.post(url, PIXEL, headers=HEADERS, timeout=timeout, **PLAIN)
    except requests.Timeout:
        return f"no prediction of {model} within {timeout:g} s"
    except requests.RequestException:
        return SILENT
    failed = answer.status_code >= 500 and answer.status_code != 503
    return f"predictions of {model} fail with status {answer.status_code}" if failed else ""


def tell(control: Path, left_out: Mapping[str, str]) -> bool:
    """Tell nginx which replicas get no requests; False if it does not accept that now."""
    found = {address: {"why": why, "is_silent": why == SILENT} for address, why in left_out.items()}
    return send(control, "left_out", found)


def send(control: Path, name: str, content: object) -> bool:
    """Send nginx JSON under a name; False if it does not accept that now."""
    body = json.dumps(content).encode()
    head = f"POST /{name} HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n"
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(PING_TIMEOUT_SECONDS)
            connection.connect(str(control))
            connection.sendall(head.encode() + body)
            return b" 204 " in connection.recv(1024)
    except OSError:
        return False


class Watch:
    """Checks all replicas in parallel, each in its own thread, until it is stopped."""

    def __init__(self, find: Callable[[], Sequence[str]], models: Sequence[str], log: Log) -> None:
        """`find` gives the current replicas as IP:PORT."""
        self._find = find
        self._models = models
        self._log = log
        self._replicas: dict[str, _Replica] = {}
        self._ended = threading.Event()

    def start(self, control: Path) -> None:
        """Begin, and report to the nginx that listens on the socket `control`."""
        threading.Thread(target=self._run, args=(control,), name="watch", daemon=True).start()

    def stop(self) -> None:
        self._ended.set()

    def left_out(self) -> dict[str, str]:
        """The replicas that do not answer, each with what is wrong with it."""
        replicas = self._replicas.items()
        return {address: replica.reason for address, replica in replicas if replica.reason}

    def _run(self, control: Path) -> None:
        told: object = None
        while not self._ended.is_set():
            known = self._replicas
            self._replicas = {found: known.get(found, _Replica()) for found in self._find()}
            for address, replica in self._replicas.items():
                if not replica.asking:
                    replica.asking = True
                    threading.Thread(target=self._ask, args=(address, replica), daemon=True).start()
            left_out = self.left_out()
            now = (tuple(self._replicas), left_out, time.monotonic() // TELL_SECONDS)
            if now != told and tell(control, left_out):
                told = now
            self._ended.wait(ASK_SECONDS)

    def _ask(self, address: str, replica: _Replica) -> None:
        try:
            self._note(address, replica, self._find_failure(address, replica))
        finally:
            replica.asking = False

    def _find_failure(self, address: str, replica: _Replica) -> str:
        try:
            with direct_session() as session:
                session.get(f"http://{address}/ping", timeout=PING_TIMEOUT_SECONDS, **PLAIN)
        except requests.RequestException:
            return SILENT
        if time.monotonic() < replica.predict_at and not replica.reason:
            return ""
        for model in self._models:
            if failure := ask_prediction(address, model, PREDICTION_TIMEOUT_SECONDS):
                replica.predict_at = 0.0  # again at once
                return failure
        replica.predict_at = time.monotonic() + PREDICTION_SECONDS
        return ""

    def _note(self, address: str, replica: _Replica, failure: str) -> None:
        replica.failures = replica.failures + 1 if failure else 0
        if failure and replica.failures >= FAILURES and not replica.reason:
            replica.reason = failure
            self._log.event("ERROR", "replica_left_out", replica=address, message=failure)
        elif failure and replica.reason:
            replica.reason = failure
        elif not failure and replica.reason:
            replica.reason = ""
            self._log.event("INFO", "replica_taken_back", replica=address)
