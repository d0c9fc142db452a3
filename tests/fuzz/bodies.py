"""Sends mutated bodies of V1 and V2 through the gateway to TorchServe, and judges the answers.

    .venv/bin/python -m tests.fuzz.bodies --requests 10000 [--seed S]

A finding is a 5xx, an answer that is not in the protocol's form, a request that is never answered,
or a process of nginx or TorchServe that was replaced.
"""

import argparse
import asyncio
import json
import random
import struct
import sys
import tempfile
import time
from base64 import b64encode
from pathlib import Path
from typing import NamedTuple

import aiohttp

from tests.drawing import encode, quarters
from tests.fuzz.http import HANG_SECONDS, LIMITS, Findings, report, watched
from tests.fuzz.messages import damaged
from tests.fuzz.target import Target
from tests.fuzz.targets import protocol_v1, protocol_v2
from tests.gateway.running import running, settings
from tests.server.serving import Server, package, serving

CLIENTS = 16
MODEL = "mobilenet_v2"
PATHS = {"V1": f"/v1/models/{MODEL}:predict", "V2": f"/v2/models/{MODEL}/infer"}
TARGETS = {"V1": protocol_v1.TARGET, "V2": protocol_v2.TARGET}
TYPES = ("application/json", "application/octet-stream", "text/plain", "multipart/form-data", "")
IMAGE = encode(quarters((8, 8)), "PNG")
TEXT = b64encode(IMAGE)
ELEMENT = struct.pack("<I", len(IMAGE)) + IMAGE
# Of the corpora: in most bodies they become an image.
IMAGES = {b"aGk=": TEXT, b"aGVsbG8=": TEXT, b"\2\0\0\0hi": ELEMENT, b"\5\0\0\0hello": ELEMENT}
LENGTH = "Inference-Header-Content-Length"
WITH_HEADER, BUILT = 3, 4  # ways of the corpus of V2


class Sent(NamedTuple):
    protocol: str
    headers: dict[str, str]
    body: bytes


def mutated(rng: random.Random) -> Sent:
    """A body of the corpora of the fuzz targets, changed in some places or in none."""
    protocol = rng.choice(("V1", "V2", "V2"))
    target = TARGETS[protocol]
    way, text = split(rng.choice(target.seeds()))
    if rng.random() < 0.8:
        for known, image in IMAGES.items():
            text = text.replace(known, image)
    text = changed(text, target, rng)
    headers = {"Content-Type": rng.choice(TYPES) if rng.random() < 0.3 else TYPES[0]}
    if way == WITH_HEADER:
        repaired = target.repair(bytes([way]) + text) if target.repair else text
        first, _, text = repaired[1:].partition(b"\n")
        headers = {"Content-Type": TYPES[1], LENGTH: first.decode("latin-1")}
    elif rng.random() < 0.1:
        headers[LENGTH] = str(rng.choice((-1, 0, 1, len(text), len(text) + 1, 2**63, "x")))
    headers = {name: value for name, value in headers.items() if value.isprintable() and value}
    return Sent(protocol, headers, text)


def split(seed: bytes) -> tuple[int, bytes]:
    """How a request came, and the rest; what the target builds itself is taken as it is."""
    return (seed[0], seed[1:]) if seed[0] != BUILT else (0, seed)


def changed(text: bytes, target: Target, rng: random.Random) -> bytes:
    for _ in range(rng.randrange(3)):
        if rng.random() < 0.5:
            text = damaged(text, rng)
        else:
            at = rng.randint(0, len(text))
            text = text[:at] + rng.choice(target.tokens) + text[at:]
    return text


def judge(sent: Sent, status: int, content_type: str, content: bytes) -> str:
    """What is wrong with an answer; "" if nothing is."""
    if status >= 500:
        return f"undeserved {status}"
    if content_type == "application/octet-stream":  # tensors behind a JSON document
        return "" if (sent.protocol, status) == ("V2", 200) else "tensors for an error"
    try:
        document = json.loads(content)
    except ValueError:
        return "an answer that is no JSON"
    if status != 200:
        error = document.get("error")
        return "" if isinstance(error, str) and error else "an error without its text"
    expected = {"V1": "predictions", "V2": "outputs"}[sent.protocol]
    return "" if isinstance(document.get(expected), list) else f"an answer without {expected}"


async def send_all(base: str, count: int, seed: int, found: Findings) -> None:
    numbers = iter(range(count))
    timeout = aiohttp.ClientTimeout(total=HANG_SECONDS)

    async def send(session: aiohttp.ClientSession) -> None:
        for number in numbers:
            sent = mutated(random.Random(f"{seed} {number}"))
            found.sent += 1
            found.kinds[sent.protocol] += 1
            url = base + PATHS[sent.protocol]
            try:
                async with session.post(url, data=sent.body, headers=sent.headers) as answer:
                    content = await answer.read()
                    found.statuses[answer.status] += 1
                    wrong = judge(sent, answer.status, answer.content_type, content)
            except (aiohttp.ClientError, asyncio.TimeoutError) as exc:
                wrong, content = f"no answer: {exc!r}", b""
            if wrong:
                found.wrong.append(f"{wrong}: {sent}\n  {content[:500]!r}")

    started = time.monotonic()
    async with aiohttp.ClientSession(timeout=timeout, skip_auto_headers=("Content-Type",)) as all_:
        await asyncio.gather(*(send(all_) for _ in range(CLIENTS)))
    found.seconds = time.monotonic() - started


async def against_torchserve(folder: Path, server: Server, count: int, seed: int) -> Findings:
    found = Findings()
    workers = server.worker_pids()
    env = settings([server], **LIMITS, models=MODEL)
    with running(folder, env) as gateway:
        async with watched(gateway, found):
            await send_all(gateway.url, count, seed, found)
    if server.worker_pids() != workers:
        found.wrong.append("workers of TorchServe were replaced")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.bodies", description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="fuzz-bodies-") as name:
        from tests.server.colours import make_weights  # imports torch, which takes seconds

        folder = Path(name)
        weights, labels = map(str, make_weights(folder))
        options = ["--weights", weights, "--labels", labels, "--device", "cpu"]
        package(folder, *options)
        with serving(folder, *options) as server:
            found = asyncio.run(against_torchserve(folder, server, args.requests, args.seed))
    print(report(found), flush=True)
    for wrong in found.wrong[:20]:
        print(f"\n{wrong[:3000]}", file=sys.stderr)
    return 1 if found.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
