"""The gRPC server's process: it gives up root's rights, listens on a Unix socket, ends in order."""

import asyncio
import ctypes
import logging
import os
import signal
import sys
from pathlib import Path
from typing import BinaryIO

import grpc

from service.logs import Log
from service.openinference.calls import Calls
from service.openinference.inference import Inference
from service.openinference.process import Config
from service.openinference.upstream import Upstream

SHOWS_METADATA = "Invalid encoding on"  # grpc prints what a client sent, which may be a key
GET_DEATH_SIGNAL, SET_DEATH_SIGNAL = 2, 1  # of Linux's prctl


class _Lines(logging.Handler):
    """What libraries log, as lines of ours."""

    def __init__(self, log: Log) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        if SHOWS_METADATA not in str(record.msg):
            message = self.format(record)  # with its traceback
            self._log.event(record.levelname, "grpc", message=message)


def serve_from(source: BinaryIO) -> int:
    """Serve as the Config on `source` says, until SIGTERM; the exit status."""
    log = Log("json")
    logging.basicConfig(handlers=[_Lines(log)], level=logging.WARNING)
    config = Config.read(source.read())
    if config.user:
        _become(*config.user)
    return asyncio.run(_serve(config, log))


async def _serve(config: Config, log: Log) -> int:
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    sizes = [
        ("grpc.max_receive_message_length", config.max_body_bytes),  # unpacked
        ("grpc.max_send_message_length", -1),
    ]
    server = grpc.aio.server(options=sizes)
    async with Upstream(Path(config.gateway), config.response_seconds) as upstream:
        calls = Calls(Inference(upstream), config, log, stopping)
        server.add_generic_rpc_handlers(calls.handlers())
        try:
            server.add_insecure_port(f"unix:{config.listen}")
        except RuntimeError as exc:
            log.event("ERROR", "grpc", message=f"it cannot listen on {config.listen}: {exc}")
            return 2
        await server.start()
        await stopping.wait()
        await server.stop(config.stop_seconds)
    return 0


def _become(user: int, group: int) -> None:
    """Give up root's rights, and keep the signal at the launcher's end, which the kernel drops.

    Once the modules are imported, which that user may not be able to read.
    """
    kept = ctypes.c_int()
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else lambda *_: 0
    prctl(GET_DEATH_SIGNAL, ctypes.byref(kept), 0, 0, 0)
    os.setgroups([])
    os.setgid(group)
    os.setuid(user)
    prctl(SET_DEATH_SIGNAL, kept.value, 0, 0, 0)
