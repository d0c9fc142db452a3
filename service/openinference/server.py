"""The gRPC server's process: it listens, gives up root's rights, and ends in order."""

import asyncio
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import grpc

from service.logs import Log
from service.openinference.calls import Calls
from service.openinference.inference import Inference
from service.openinference.process import LISTENING, Config
from service.openinference.upstream import Upstream

OPTIONS = (
    ("grpc.so_reuseport", 0),  # a port that is taken is an error
    ("grpc.max_send_message_length", -1),
    ("grpc.max_concurrent_streams", 128),  # of one connection, as nginx has it
    ("grpc.max_connection_idle_ms", 75_000),  # as nginx's keepalive_timeout
    ("grpc.server_handshake_timeout_ms", 10_000),
)
CORE = "grpc._cython.cygrpc"  # the logger on which a server of grpc.aio says why it has ended
SHOWS_METADATA = "Invalid encoding on"  # grpc prints what a client sent, which may be a key
GET_DEATH_SIGNAL, SET_DEATH_SIGNAL = 2, 1  # of Linux's prctl


class _Lines(logging.Handler):
    """What libraries log, as lines of ours."""

    def __init__(self, log: Log) -> None:
        super().__init__()
        self._log = log
        self.has_crashed = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if SHOWS_METADATA in str(record.msg):
            return
        if record.name == CORE and isinstance(record.msg, Exception):
            self.has_crashed.set()
        message = self.format(record)  # with its traceback
        self._log.event(record.levelname, "grpc", message=message)


def serve_from(source: BinaryIO) -> int:
    """Serve as the Config on `source` says, until SIGTERM; the exit status."""
    log = Log("json")
    lines = _Lines(log)
    logging.basicConfig(handlers=[lines], level=logging.WARNING)
    return asyncio.run(_serve(Config.read(source.read()), log, lines.has_crashed))


async def _serve(config: Config, log: Log, has_crashed: asyncio.Event) -> int:
    """Listen until SIGTERM.

    A server of grpc.aio stops to listen at a path that is not UTF-8, which anybody may send (grpcio
    1.85). Another takes its place at once, and what it has begun is answered.
    """
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    limit = ("grpc.max_receive_message_length", config.max_body_bytes)
    replaced: set[asyncio.Task[bool]] = set()  # that still have calls
    async with Upstream(Path(config.gateway), config.response_seconds) as upstream:
        calls = Calls(Inference(upstream), config, log, stopping)
        stop = asyncio.create_task(stopping.wait())
        user = config.user
        while True:
            has_crashed.clear()
            server = grpc.aio.server(options=[*OPTIONS, limit])
            server.add_generic_rpc_handlers(calls.handlers())
            try:
                _bind(server, config)
            except RuntimeError as exc:
                log.event("ERROR", "grpc", message=f"it cannot listen on {config.listen}: {exc}")
                return 2
            if user:
                _become(*user)
                user = None
            await server.start()
            log.event("INFO", "grpc", message=f"{LISTENING} on {config.listen}")
            crash = asyncio.create_task(has_crashed.wait())
            await asyncio.wait({stop, crash}, return_when=asyncio.FIRST_COMPLETED)
            crash.cancel()
            if stop.done():
                break
            ending = asyncio.create_task(server.wait_for_termination())
            replaced.add(ending)
            ending.add_done_callback(_forget(replaced))
        await server.stop(config.stop_seconds)
        if replaced:
            await asyncio.wait(replaced, timeout=config.stop_seconds)
    return 0


def _forget(replaced: "set[asyncio.Task[bool]]") -> "Callable[[asyncio.Task[bool]], None]":
    """What to do when a server that was replaced has answered its last call."""

    def forget(task: "asyncio.Task[bool]") -> None:
        replaced.discard(task)
        if not task.cancelled():
            task.exception()  # why it was replaced, which the log has

    return forget


def _bind(server: grpc.aio.Server, config: Config) -> None:
    """Listen, with TLS if there is a certificate. Raises RuntimeError."""
    if config.certificate:
        pair = (config.key.encode(), config.certificate.encode())
        server.add_secure_port(config.listen, grpc.ssl_server_credentials([pair]))
    else:
        server.add_insecure_port(config.listen)


def _become(user: int, group: int) -> None:
    """Give up root's rights, and keep the signal at the launcher's end, which the kernel drops."""
    kept = ctypes.c_int()
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else lambda *_: 0
    prctl(GET_DEATH_SIGNAL, ctypes.byref(kept), 0, 0, 0)
    os.setgroups([])
    os.setgid(group)
    os.setuid(user)
    prctl(SET_DEATH_SIGNAL, kept.value, 0, 0, 0)
