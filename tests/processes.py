"""Processes that tests did not start themselves, their logs, free ports, and waiting."""

import json
import socket
from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack, suppress
from typing import Any

import psutil

from service.processes import wait_until


def alive(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that still run. An orphan that has ended stays a zombie until init collects it."""
    left = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                left.append(process)
    return left


def wait_for(
    condition: Callable[[], object],
    seconds: float = 60,
    why: Callable[[], object] = lambda: "not in time",
) -> None:
    """Return once `condition()` is true; fail with what `why()` gives if that takes too long."""
    assert wait_until(condition, seconds, 0.05), why()


def events(log: str, event: str) -> list[dict[str, Any]]:
    """The JSON lines of one kind in a log, without a line that is still being written."""
    lines = [line for line in log.splitlines(keepends=True) if (line[0], line[-1]) == ("{", "\n")]
    return [facts for facts in map(json.loads, lines) if facts["event"] == event]


def lines_of(
    request_ids: Collection[str], lines: Callable[[], list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """The lines of some requests, which are written a moment after their answers are sent."""

    def found() -> list[dict[str, Any]]:
        return [line for line in lines() if line["request_id"] in request_ids]

    def missing() -> set[str]:
        return set(request_ids) - {line["request_id"] for line in found()}

    wait_for(lambda: not missing(), 10, lambda: f"no line of {missing()} in the log")
    assert len(found()) == len(request_ids)
    return found()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def free_ports() -> dict[str, int]:
    """Three ports whose gRPC counterparts, 1010 below, are free as well."""
    ports: dict[str, int] = {}
    with ExitStack() as held:
        while len(ports) < 3:
            with suppress(OSError):
                first = held.enter_context(socket.socket())
                first.bind(("127.0.0.1", 0))
                port = first.getsockname()[1]
                second = held.enter_context(socket.socket())
                second.bind(("127.0.0.1", port - 1010))
                ports[("port", "management-port", "metrics-port")[len(ports)]] = port
    return ports
