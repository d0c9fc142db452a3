"""Whether every protocol gives the same answers, and what each costs.

Every image goes through V1, V2 in JSON, V2 with binary tensors and gRPC, and each answer is
compared with that of `/predict`. Then the forms take turns on the same server, and the CPU time of
all its processes is divided by the answers. All go through the gateway.
"""

import argparse
import asyncio
import base64
import json
import statistics
import struct
import sys
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import aiohttp
import grpc
import numpy as np
from tqdm import tqdm

from benchmarks.alone import started_alone
from benchmarks.environments import SetupFailed
from benchmarks.servers import Started, StartFailed, make_parser, say, show
from benchmarks.usage import GATEWAY, GRPC, JAVA, WORKER, Meter
from service.load.images import load_images
from service.load.measurement import Load, Sample, summarise
from service.load.processes import Server
from service.openinference import inference_pb2 as pb
from service.ports import free_ports

TOP_K = 5
NEAR = 1e-6
RAW, BINARY = "/predict", "V2 binary"
MOST = 1.10  # of the CPU time of the image as the whole body
NAMES = ("label", "class_id", "confidence")
WARMUP_SECONDS = 1.0
COLUMNS = ("form", "requests", "p50_ms", "cpu_ms", "of_raw", "nginx", "java", "worker", "grpc")

Answer = list[tuple[str, int, float]]  # label, class, confidence
Ask = Callable[[bytes], Awaitable[Answer]]


class WrongAnswer(Exception):
    """A request was not answered as it should be; the message says how."""


@dataclass(frozen=True)
class Client:
    """Asks a running gateway for the classes of a JPEG, in each of the forms."""

    session: aiohttp.ClientSession
    channel: grpc.aio.Channel
    base: str
    model: str

    def forms(self) -> dict[str, Ask]:
        return {
            RAW: self.raw,
            "V1": self.v1,
            "V2 JSON": self.v2_json,
            BINARY: self.v2_binary,
            "gRPC": self.grpc,
        }

    async def raw(self, image: bytes) -> Answer:
        headers = {"Content-Type": "image/jpeg"}
        content, _ = await self._post(f"/predict?top_k={TOP_K}", image, headers)
        return of_predictions(json.loads(content)["predictions"])

    async def v1(self, image: bytes) -> Answer:
        document = {"instances": [{"b64": encoded(image)}], "parameters": {"top_k": TOP_K}}
        content, _ = await self._post_json(f"/v1/models/{self.model}:predict", document)
        return of_predictions(json.loads(content)["predictions"][0])

    async def v2_json(self, image: bytes) -> Answer:
        document = v2_document({"data": [encoded(image)]})
        content, _ = await self._post_json(f"/v2/models/{self.model}/infer", document)
        outputs = json.loads(content)["outputs"]
        return list(zip(*(output["data"] for output in outputs), strict=True))

    async def v2_binary(self, image: bytes) -> Answer:
        tensor = element(image)
        document = v2_document({"parameters": {"binary_data_size": len(tensor)}})
        document["parameters"]["binary_data_output"] = True
        text = json.dumps(document).encode()
        headers = {
            "Content-Type": "application/octet-stream",
            "Inference-Header-Content-Length": str(len(text)),
        }
        path = f"/v2/models/{self.model}/infer"
        content, answered = await self._post(path, text + tensor, headers)
        length = int(answered["Inference-Header-Content-Length"])
        blobs, at = [], length
        for output in json.loads(content[:length])["outputs"]:
            size = output["parameters"]["binary_data_size"]
            blobs.append(content[at : at + size])
            at += size
        return of_tensors(blobs)

    async def grpc(self, image: bytes) -> Answer:
        request = pb.ModelInferRequest(model_name=self.model, raw_input_contents=[element(image)])
        request.inputs.add(name="image", datatype="BYTES", shape=[1])
        request.parameters["top_k"].int64_param = TOP_K
        for name in NAMES:
            request.outputs.add(name=name)
        infer = self.channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelInferResponse.FromString,
        )
        return of_tensors((await infer(request)).raw_output_contents)

    async def _post_json(self, path: str, document: Any) -> tuple[bytes, Any]:
        headers = {"Content-Type": "application/json"}
        return await self._post(path, json.dumps(document).encode(), headers)

    async def _post(self, path: str, body: bytes, headers: dict[str, str]) -> tuple[bytes, Any]:
        """Raises WrongAnswer if the status is not 200."""
        async with self.session.post(self.base + path, data=body, headers=headers) as response:
            content = await response.read()
            if response.status != 200:
                raise WrongAnswer(f"{path}: {response.status} {content[:200]!r}")
            return content, response.headers


def v2_document(tensor: dict[str, Any]) -> dict[str, Any]:
    return {
        "parameters": {"top_k": TOP_K},
        "inputs": [{"name": "image", "datatype": "BYTES", "shape": [1]} | tensor],
        "outputs": [{"name": name} for name in NAMES],
    }


def encoded(image: bytes) -> str:
    return base64.b64encode(image).decode()


def element(image: bytes) -> bytes:
    """One element of a tensor of BYTES."""
    return struct.pack("<I", len(image)) + image


def of_predictions(predictions: Sequence[dict[str, Any]]) -> Answer:
    return [(one["class"], one["class_id"], one["confidence"]) for one in predictions]


def of_tensors(blobs: Sequence[bytes]) -> Answer:
    """The three tensors as binary data."""
    texts, class_ids, confidences = blobs
    labels, at = [], 0
    while at < len(texts):
        (size,) = struct.unpack_from("<I", texts, at)
        labels.append(texts[at + 4 : at + 4 + size].decode())
        at += 4 + size
    return list(
        zip(
            labels,
            np.frombuffer(class_ids, "<i8").tolist(),
            np.frombuffer(confidences, "<f4").tolist(),
            strict=True,
        )
    )


def difference(found: Answer, expected: Answer) -> float:
    """The greatest difference of two confidences. Raises WrongAnswer if classes differ."""
    if [one[:2] for one in found] != [one[:2] for one in expected]:
        raise WrongAnswer(f"{found} in place of {expected}")
    return max(abs(one[2] - other[2]) for one, other in zip(found, expected, strict=True))


async def compare(client: Client, images: Sequence[bytes]) -> dict[str, float]:
    """The greatest difference of each form from `/predict`. Raises WrongAnswer."""
    most: dict[str, float] = defaultdict(float)
    for image in tqdm(images, desc="comparing"):
        expected = await client.raw(image)
        for name, ask in client.forms().items():
            most[name] = max(most[name], difference(await ask(image), expected))
    return dict(most)


async def load(ask: Ask, images: Sequence[bytes], clients: int, seconds: float) -> list[Sample]:
    """So many clients, each with its next image when it has its answer. Raises WrongAnswer."""
    source = cycle(images)
    samples: list[Sample] = []
    end = time.perf_counter() + seconds

    async def send() -> None:
        while (now := time.perf_counter()) < end:
            sample = Sample(now, now, sent=1)
            samples.append(sample)
            await ask(next(source))
            sample.ended, sample.outcome = time.perf_counter(), "ok"

    await asyncio.gather(*(send() for _ in range(clients)))
    return samples


async def measure(
    client: Client, server: Server, images: Sequence[bytes], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each form: CPU milliseconds an answer, the median over the rounds."""
    forms = client.forms()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in forms}
    for number in tqdm(range(args.rounds), desc="rounds"):
        order = list(forms) if number % 2 == 0 else list(reversed(forms))
        for name in order:
            await load(forms[name], images, args.clients, WARMUP_SECONDS)
            meter = Meter(server)
            begin = time.perf_counter()
            meter.read()
            samples = await load(forms[name], images, args.clients, args.seconds)
            end = time.perf_counter()
            meter.read()
            what = Load(seconds=end - begin, concurrency=args.clients)
            run = summarise(samples, begin, end, what, 0.0)
            parts: dict[str, float] = defaultdict(float)
            for part, ms in meter.ms_per_request(run).items():
                parts[part.partition(":")[0]] += ms
            figures = {"requests": run.ok, "p50_ms": run.p50_ms or 0.0}
            found[name].append(figures | {"cpu_ms": sum(parts.values())} | parts)
    raws = [row["cpu_ms"] for row in found[RAW]]
    rows = []
    for name, runs in found.items():
        shares = [run["cpu_ms"] / raw for run, raw in zip(runs, raws, strict=True)]
        row: dict[str, Any] = {"form": name, "requests": int(sum(run["requests"] for run in runs))}
        row |= {key: statistics.median(run[key] for run in runs) for key in ("p50_ms", "cpu_ms")}
        row["of_raw"] = statistics.median(shares)
        for part in (GATEWAY, JAVA, WORKER, GRPC):
            row[part.lower()] = statistics.median(run.get(part, 0.0) for run in runs)
        rows.append(row)
    return rows


async def run(target: Started, grpc_port: int, args: argparse.Namespace) -> dict[str, Any]:
    """Raises WrongAnswer."""
    images = [image.body for image in load_images(args.images)]
    base = target.url.removesuffix(f"/predictions/{args.model}")
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession(trust_env=False))
        channel = grpc.aio.insecure_channel(
            f"127.0.0.1:{grpc_port}", [("grpc.enable_http_proxy", 0)]
        )
        await stack.enter_async_context(channel)
        client = Client(session, channel, base, args.model)
        differences = await compare(client, images)
        rows = await measure(client, target.server, images, args)
    return {"images": len(images), "differences": differences, "forms": rows}


def main(argv: Sequence[str] | None = None) -> int:
    description = "Compare the answers of every protocol, and what each costs."
    parser = make_parser("protocols", description, "mobilenet_v2")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=6)
    parser.set_defaults(seconds=4)
    args = parser.parse_args(argv)
    [grpc_port] = free_ports(1)
    try:
        with started_alone(args, GATEWAY_GRPC_PORT=str(grpc_port)) as alone:
            found = asyncio.run(run(alone.target, grpc_port, args))
    except (SetupFailed, StartFailed, WrongAnswer) as exc:
        print(f"failed: {exc}", file=sys.stderr)
        return 1
    worst = max(found["differences"].values())
    [share] = [row["of_raw"] for row in found["forms"] if row["form"] == BINARY]
    say(f"\n{found['images']} images: the classes are the same, confidences within {worst:.1e}\n")
    say("CPU milliseconds an answer, medians of the rounds\n")
    show(found["forms"], COLUMNS, digits=2)
    say(f"{BINARY} costs {share:.3f} of {RAW} (at most {MOST})")
    say(json.dumps({"clients": args.clients, "seconds": args.seconds} | found))
    return 0 if worst <= NEAR and share <= MOST else 1


if __name__ == "__main__":
    sys.exit(main())
