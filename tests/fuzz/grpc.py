"""Sends mutated messages to the gateway's gRPC, and looks for answers that nobody should get.

    .venv/bin/python -m tests.fuzz.grpc --requests 10000 [--seed S] [--real]

Behind the gateway is a stand-in that takes nothing but V2 over REST; with --real, TorchServe. A
finding is INTERNAL or UNKNOWN, a call that is never answered, a traceback in the log, anything
else that reaches the stand-in, or a process that was replaced. Then a tenth as many connections get
raw frames of HTTP/2, of whose answers only the time counts; a last call must be answered.
"""

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from tests.fuzz.http import conclude, processes
from tests.fuzz.messages import SERVICE, Message, Stream, message, stream
from tests.gateway.running import Gateway, running, settings
from tests.gateway.v2 import serving_grpc
from tests.processes import free_port
from tests.server.serving import Server, package, serving

CALLS = 32  # at a time
HANG_SECONDS = 30
QUIET_SECONDS = 0.2  # after which a connection is closed from here
MODEL = {"models": "mobilenet_v2"}
UNDESERVED = {"INTERNAL", "UNKNOWN", "DEADLINE_EXCEEDED", "UNAVAILABLE", "DATA_LOSS"}
LIMITS = {
    "client_timeout_seconds": "2",
    "body_timeout_seconds": "4",
    "max_body_bytes": "65536",
    "max_concurrent": "1000",
    "max_concurrent_per_client": "1000",
}


@dataclass
class Findings:
    """What was wrong, what else came, and how much of it."""

    sent: int = 0
    wrong: list[str] = field(default_factory=list)
    codes: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0


async def answer_to(channel: grpc.aio.Channel, sent: Message) -> str:
    """The name of the code, "OK" for an answer."""
    try:
        method: Any = channel.unary_unary(sent.method)
        await method(sent.data, timeout=HANG_SECONDS)
    except grpc.aio.AioRpcError as error:
        return str(error.code().name)
    return "OK"


async def is_done(port: int, sent: Stream) -> bool:
    """Whether the server says or does anything about these frames in time."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        with suppress(OSError):  # the server has closed it
            writer.write(sent.data)
            with suppress(asyncio.TimeoutError):
                while await asyncio.wait_for(reader.read(65536), QUIET_SECONDS):
                    pass
            writer.write_eof()
            ended = asyncio.ensure_future(reader.read())
            return bool((await asyncio.wait({ended}, timeout=HANG_SECONDS))[0])
    finally:
        writer.close()
    return True


async def send_all(port: int, count: int, seed: int, found: Findings) -> None:
    numbers = iter(range(count))
    connections = iter(range(count // 10))
    target, options = f"127.0.0.1:{port}", [("grpc.enable_http_proxy", 0)]

    async def send(channel: grpc.aio.Channel) -> None:
        for number in numbers:
            rng = random.Random(f"{seed} {number}")
            found.sent += 1
            sent = message(rng)
            found.kinds[sent.kind] += 1
            code = await answer_to(channel, sent)
            found.codes[code] += 1
            if code in UNDESERVED:
                found.wrong.append(f"undeserved {code}: {sent}")

    async def connect() -> None:
        for number in connections:
            frames = stream(random.Random(f"{seed} frames {number}"))
            found.kinds[frames.kind] += 1
            if not await is_done(port, frames):
                found.wrong.append(f"not done: {frames}")

    started = time.monotonic()
    async with grpc.aio.insecure_channel(target, options) as channel:
        await asyncio.gather(*(send(channel) for _ in range(CALLS)))
    await asyncio.gather(*(connect() for _ in range(CALLS)))
    await asyncio.sleep(1)
    async with grpc.aio.insecure_channel(target, options) as channel:
        last = Message("last", f"{SERVICE}ServerLive", b"")
        if (code := await answer_to(channel, last)) != "OK":
            found.wrong.append(f"the last call: {code}")
    found.seconds = time.monotonic() - started


def watch(gateway: Gateway, port: int, count: int, seed: int) -> Findings:
    """All calls, and what the gateway says meanwhile."""
    found = Findings()
    before = processes(gateway)
    asyncio.run(send_all(port, count, seed, found))
    if processes(gateway) != before:
        found.wrong.append("processes of the gateway were replaced")
    found.wrong += [
        f"in the log: {line}" for line in gateway.lines("grpc") if line["level"] != "INFO"
    ]
    return found


def against_stand_in(folder: Path, count: int, seed: int) -> Findings:
    with serving_grpc(folder, **LIMITS | MODEL) as served:
        found = watch(served.gateway, served.port, count, seed)
        found.wrong += served.replica.faults
    return found


def against_torchserve(folder: Path, server: Server, count: int, seed: int) -> Findings:
    """The same, and TorchServe's workers, none of which may be replaced."""
    port, workers = free_port(), server.worker_pids()
    limits = LIMITS | {"grpc_port": str(port)}
    with running(folder, settings([server], **limits)) as gateway:
        found = watch(gateway, port, count, seed)
    if server.worker_pids() != workers:
        found.wrong.append("workers of TorchServe were replaced")
    return found


def report(found: Findings) -> str:
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(found.kinds.items()))
    codes = ", ".join(f"{code} {count}" for code, count in sorted(found.codes.items()))
    return (
        f"{found.sent} calls in {found.seconds:.0f} s "
        f"({found.sent / max(found.seconds, 0.001):.0f}/s), findings: {len(found.wrong)}\n"
        f"kinds: {kinds}\nanswers: {codes}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.grpc", description=__doc__)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--real", action="store_true", help="in front of TorchServe")
    args = parser.parse_args(argv)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fuzz-grpc-")))
        if args.real:
            from tests.server.colours import make_weights  # imports torch, which takes seconds

            weights, labels = map(str, make_weights(folder))
            options = ["--weights", weights, "--labels", labels, "--device", "cpu"]
            package(folder, *options)
            server = stack.enter_context(serving(folder, *options))
            found = against_torchserve(folder, server, args.requests, args.seed)
        else:
            found = against_stand_in(folder, args.requests, args.seed)
    return conclude(report(found), found.wrong)


if __name__ == "__main__":
    sys.exit(main())
