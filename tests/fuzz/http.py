"""Sends mutated requests to the gateway, and looks for answers that nobody should get.

    .venv/bin/python -m tests.fuzz.http --requests 50000 [--seed S] [--real]

nginx stands in front of a server that accepts only what nginx should write; with --real, in front
of TorchServe. A finding is an answer to a request inside the body of another, answers out of step,
a 5xx that the request does not deserve, a connection that is never answered, anything else that
reaches the server behind, or a process of nginx or TorchServe that was replaced.
"""

import argparse
import asyncio
import hashlib
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.fuzz.mutations import Mutated, mutate
from tests.fuzz.recording import recording
from tests.gateway.running import Gateway, running, settings, variables
from tests.server.serving import Server, package, serving

CONNECTIONS = 64  # at a time
HANG_SECONDS = 30
QUIET_SECONDS = 1.0  # after which a connection with an answer is closed from here
UNDESERVED = {500, 502, 503, 504, 507}
REFUSALS = {400, 411, 413, 414, 431, 501, 505}
LIMITS = {
    "client_timeout_seconds": "2",
    "body_timeout_seconds": "4",
    "max_body_bytes": "65536",
    "max_concurrent": "1000",
    "max_concurrent_per_client": "1000",
}
HEAD = re.compile(rb"HTTP/1\.1 (\d{3}) [A-Za-z -]*\r\n((?:[A-Za-z-]+: [^\r\n]*\r\n)*)\r\n")
CHUNK = re.compile(rb"([0-9a-f]+)\r\n")
MARK = re.compile(r"(outer|inner|tail)-(\d+)")
ORDER = ("outer", "inner", "tail")


@dataclass(frozen=True)
class Answer:
    """One answer on a connection; `who` asked is known if the request got as far as TorchServe."""

    status: int
    who: str
    body: bytes


@dataclass
class Findings:
    """What was wrong, what else came, and how much of it."""

    sent: int = 0
    wrong: list[str] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0


def parse(stream: bytes, sent: Mutated, echoes: bool) -> tuple[list[Answer], bytes]:
    """The answers on a connection, and what is left of the stream."""
    answers = []
    while match := HEAD.match(stream):
        headers = {
            name.lower(): value
            for name, _, value in (
                line.partition(": ") for line in match[2].decode("latin-1").splitlines()
            )
        }
        status = int(match[1])
        if status == 100:
            stream = stream[match.end() :]
            continue
        taken = take_body(stream[match.end() :], headers)
        if taken is None:
            break
        body, stream = taken
        who = asker(headers, body, sent) if echoes else asker_by_length(headers, body)
        answers.append(Answer(status, who, body))
    return answers, stream


def asker(headers: Mapping[str, str], body: bytes, sent: Mutated) -> str:
    """Who asked, by the id that the stand-in repeats; "" if nginx itself has answered."""
    marked = MARK.fullmatch(headers.get("x-request-id", ""))
    if marked and marked[0].encode() not in sent.data:
        raise ValueError(f"the answer to {marked[0]} came to {sent.number}")
    return marked[1] if marked and int(marked[2]) == sent.number else ""


def asker_by_length(headers: Mapping[str, str], body: bytes) -> str:
    """The same from the handler's refusal of a body, which says how many bytes it had."""
    if "x-model-version" not in headers:
        return ""
    match = re.match(r"(\d+) bytes", json.loads(body).get("message", ""))
    return {"5": "inner", "4": "tail"}.get(match[1] if match else "", "outer")


def take_body(stream: bytes, headers: Mapping[str, str]) -> tuple[bytes, bytes] | None:
    """The body of an answer and what follows it; None if it is not complete."""
    if headers.get("transfer-encoding") != "chunked":
        length = int(headers.get("content-length", "-1"))
        return (stream[:length], stream[length:]) if 0 <= length <= len(stream) else None
    body = b""
    while match := CHUNK.match(stream):
        size = int(match[1], 16)
        piece, end = stream[match.end() :][:size], match.end() + size
        if stream[end : end + 2] != b"\r\n":
            return None
        body, stream = body + piece, stream[end + 2 :]
        if not size:
            return body, stream
    return None


def judge(mutated: Mutated, stream: bytes, in_time: bool, echoes: bool) -> str:
    """What is wrong with the answers on a connection; "" if nothing is."""
    try:
        answers, rest = parse(stream, mutated, echoes)
    except ValueError as error:
        return str(error)
    statuses = [answer.status for answer in answers]
    askers = [answer.who for answer in answers if answer.who]
    if not in_time:
        return f"not done after {HANG_SECONDS} s, with {statuses}"
    if undeserved := UNDESERVED & {*statuses}:
        return f"undeserved {undeserved}"
    if sorted({*askers}, key=ORDER.index) != askers and (echoes or mutated.inner != "unknown"):
        return f"out of step: {askers}"  # damage to a length would look like that, too
    if mutated.inner == "unknown":
        return ""
    if rest:
        return f"no answer: {rest[:200]!r}"
    if mutated.inner == "refused":
        if len(answers) > 1 or askers or not {*statuses} <= REFUSALS:
            return f"not refused: {statuses} to {askers}"
        return ""
    expected = ["outer", "tail"] if mutated.inner == "inside" else ["outer", "inner", "tail"]
    if askers != expected or len(answers) != len(expected):
        return f"expected answers to {expected}, got {statuses} to {askers}"
    if echoes and mutated.body is not None:
        seen = json.loads(answers[0].body)
        if seen["sha256"] != hashlib.sha256(mutated.body).hexdigest():
            return f"another body was passed on: {seen['length']} bytes, not {len(mutated.body)}"
    return ""


async def exchange(port: int, mutated: Mutated) -> tuple[bytes, bool]:
    """What comes back on a connection, and whether it came to an end in time."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    stream, started = b"", time.monotonic()
    try:
        writer.write(mutated.data)
        while (left := HANG_SECONDS - (time.monotonic() - started)) > 0:
            quiet = QUIET_SECONDS if stream and mutated.inner == "unknown" else left
            try:
                piece = await asyncio.wait_for(reader.read(65536), quiet)
            except asyncio.TimeoutError:  # not the builtin one before Python 3.11
                return stream, quiet < left
            if not piece:
                return stream, True
            stream += piece
        return stream, False
    except ConnectionError:
        return stream, True  # refused while it was still being sent
    finally:
        writer.close()


async def send_all(port: int, count: int, seed: int, found: Findings, echoes: bool) -> None:
    numbers = iter(range(count))

    async def send() -> None:
        for number in numbers:
            mutated = mutate(number, random.Random(f"{seed} {number}"))
            stream, in_time = await exchange(port, mutated)
            found.sent += 1
            found.kinds[mutated.kind.removesuffix(", damaged")] += 1
            found.statuses.update(map(int, re.findall(rb"HTTP/1\.1 (\d{3}) ", stream)))
            if wrong := judge(mutated, stream, in_time, echoes):
                found.wrong.append(f"{mutated.kind}: {wrong}\n  {mutated.data!r}\n  {stream!r}")

    started = time.monotonic()
    await asyncio.gather(*(send() for _ in range(CONNECTIONS)))
    found.seconds = time.monotonic() - started


def processes(gateway: Gateway) -> set[int]:
    """nginx's: none may be replaced."""
    return {each.pid for each in psutil.Process(gateway.process.pid).children(recursive=True)}


@asynccontextmanager
async def watched(gateway: Gateway, found: Findings) -> AsyncIterator[None]:
    before = processes(gateway)
    yield
    if processes(gateway) != before:
        found.wrong.append("processes of nginx were replaced")
    said = gateway.stderr.read_text("utf-8", "replace")
    found.wrong += re.findall(
        r".*(?:\[alert\]|\[crit\]|\[emerg\]|exited on signal|lua.*error).*", said
    )


async def against_recording(folder: Path, count: int, seed: int) -> Findings:
    """The gateway in front of a server that takes nothing but what nginx should write."""
    found = Findings()
    async with AsyncExitStack() as stack:
        seen = await stack.enter_async_context(recording())
        env = variables(upstreams=seen.address, rate="0", **LIMITS)
        start = await asyncio.to_thread(stack_running, stack, folder, env)
        async with watched(start, found):
            await send_all(start.port, count, seed, found, echoes=True)
        found.wrong += seen.faults
    return found


def stack_running(stack: AsyncExitStack, folder: Path, env: dict[str, str]) -> Gateway:
    return stack.enter_context(running(folder, env))


async def against_torchserve(folder: Path, server: Server, count: int, seed: int) -> Findings:
    """The gateway in front of TorchServe, which is checked for replaced workers as well."""
    found = Findings()
    workers = server.worker_pids()
    with running(folder, settings([server], **LIMITS)) as gateway:
        async with watched(gateway, found):
            await send_all(gateway.port, count, seed, found, echoes=False)
    if server.worker_pids() != workers:
        found.wrong.append("workers of TorchServe were replaced")
    return found


def report(found: Findings) -> str:
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(found.kinds.items()))
    statuses = ", ".join(f"{status}: {count}" for status, count in sorted(found.statuses.items()))
    return (
        f"{found.sent} requests in {found.seconds:.0f} s "
        f"({found.sent / max(found.seconds, 0.001):.0f}/s), findings: {len(found.wrong)}\n"
        f"kinds: {kinds}\nanswers: {statuses}"
    )


def conclude(text: str, wrong: Sequence[str]) -> int:
    """Print a report and the first findings; the exit status."""
    print(text, flush=True)
    for each in wrong[:20]:
        print(f"\n{each[:3000]}", file=sys.stderr)
    return 1 if wrong else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.http", description=__doc__)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--real", action="store_true", help="in front of TorchServe")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="fuzz-http-") as name:
        folder = Path(name)
        if args.real:
            from tests.server.colours import make_weights  # imports torch, which takes seconds

            weights, labels = map(str, make_weights(folder))
            options = [
                "--weights",
                weights,
                "--labels",
                labels,
                "--device",
                "cpu",
                "--workers",
                "2",
            ]
            package(folder, *options)
            with serving(folder, *options) as server:
                found = asyncio.run(against_torchserve(folder, server, args.requests, args.seed))
        else:
            found = asyncio.run(against_recording(folder, args.requests, args.seed))
    return conclude(report(found), found.wrong)


if __name__ == "__main__":
    sys.exit(main())
