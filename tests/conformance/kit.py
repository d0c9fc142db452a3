"""Run every client against one server, and hold their answers against each other."""

import base64
import json
import os
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

from tests.conformance.checks import (
    FAIL,
    KIT,
    NOT_OFFERED,
    PASS,
    REST,
    Json,
    Result,
    Subject,
    differences,
)
from tests.conformance.environments import ROOT, prepare
from tests.conformance.tensors import binary_request, drawn_images, takes_images

CLIENTS = {  # each program in clients/, and the environment it runs in
    "plain_v1": "tools",
    "plain_v2": "tools",
    "schema": "tools",
    "triton_http": "tritonclient",
    "triton_grpc": "tritonclient",
    "kserve_sdk": "kserve",
    "buf_curl": "tools",
}
CLIENT_SECONDS = 600
ASK_SECONDS = 30
REFERENCE = "V2 REST JSON"  # the way that the others' answers are held against


class ClientFailed(Exception):
    """A client's program ended without its results; the message is what it said."""


class NoServer(Exception):
    """Nothing answers at the URL."""


def examine(url: str, model: str, *, grpc: str | None, images: Sequence[Path]) -> Subject:
    """What the server says of itself and its model. Raises NoServer if it cannot be reached."""
    url = url.rstrip("/")
    server = _ask(f"{url}/v2")
    metadata = _ask(f"{url}/v2/models/{model}")
    inputs = _tensors(metadata.get("inputs"))
    pictures = [path.read_bytes() for path in images] or drawn_images()
    subject = Subject(
        url=url,
        model=model,
        grpc=grpc,
        version=next(iter(metadata.get("versions") or ()), None),
        inputs=inputs,
        outputs=_tensors(metadata.get("outputs")),
        extensions=tuple(map(str, server.get("extensions") or ())),
        images=tuple(base64.b64encode(picture).decode() for picture in pictures)
        if images or takes_images(list(inputs))
        else (),
    )
    return replace(subject, binary=_answers_binary(subject))


def run(subject: Subject, clients: Sequence[str] = tuple(CLIENTS)) -> Iterator[Result]:
    """Every check's result as it comes. Raises SetupFailed or ClientFailed."""
    names = sorted({CLIENTS[name] for name in clients})
    with ThreadPoolExecutor() as pool:
        pythons = dict(zip(names, pool.map(prepare, names), strict=True))
    answers: dict[str, list[Json]] = {}
    for name in clients:
        *results, collected = _run_client(pythons[CLIENTS[name]], name, subject)
        answers |= collected
        yield from (Result(**result) for result in results)
    yield from compare(answers)


def compare(answers: dict[str, list[Json]]) -> Iterator[Result]:
    """Whether each way gave what JSON gave, image for image, within 1e-6."""
    expected = answers.get(REFERENCE)
    for way in answers.keys() - {REFERENCE} if expected else ():
        images = chain.from_iterable(map(differences, expected or (), answers[way]))
        found = [*images]
        if len(answers[way]) != len(expected or ()):
            found.append(f"{len(answers[way])} answers to {len(expected or ())} images")
        yield Result(
            protocol="V2 gRPC" if "gRPC" in way else "V2 REST",
            name=f"the same result: {way.removeprefix('V2 ')}",
            client=KIT,
            states="One request has one result, whichever representation it comes in.",
            source=REST,
            outcome=FAIL if found else PASS,
            seen=found[0] if found else "",
        )


def counts(results: Sequence[Result]) -> dict[str, int]:
    return {
        outcome: sum(result.outcome == outcome for result in results)
        for outcome in (PASS, FAIL, NOT_OFFERED)
    }


def _run_client(python: Path, name: str, subject: Subject) -> list[Any]:
    """The lines of JSON that a client's program prints."""
    done = subprocess.run(
        [str(python), "-m", f"tests.conformance.clients.{name}"],
        cwd=ROOT,
        # Their tools' folder, and no package of the environment that this runs in.
        env={**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}", "PYTHONPATH": ""},
        input=json.dumps(asdict(subject)),
        capture_output=True,
        text=True,
        timeout=CLIENT_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        raise ClientFailed(f"the program of {name} failed:\n{done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def _ask(url: str) -> Json:
    """The JSON object at a URL, or an empty one if there is none."""
    try:
        with urllib.request.urlopen(url, timeout=ASK_SECONDS) as answer:  # noqa: S310 the user's
            content = json.load(answer)
    except (urllib.error.HTTPError, json.JSONDecodeError, UnicodeDecodeError):
        return {}
    except (OSError, ValueError) as exc:
        raise NoServer(f"{url}: {exc}") from exc
    return content if isinstance(content, dict) else {}


def _answers_binary(subject: Subject) -> bool:
    """Whether a request with binary data gets a 200. Several servers do not announce it."""
    if not subject.inputs:
        return False
    described, data = binary_request(subject)
    head = json.dumps(described).encode()
    request = urllib.request.Request(  # noqa: S310 the user's
        f"{subject.url}/v2/models/{subject.model}/infer",
        data=head + data,
        headers={
            "Content-Type": "application/octet-stream",
            "Inference-Header-Content-Length": str(len(head)),
        },
    )
    try:
        with urllib.request.urlopen(request, timeout=ASK_SECONDS):  # noqa: S310
            return True
    except OSError:
        return False


def _tensors(described: object) -> tuple[Json, ...]:
    """The tensors of a metadata answer; none if they are not described as they must be."""
    fields = {"name": str, "datatype": str, "shape": list}
    if isinstance(described, list) and all(
        isinstance(tensor, dict) and isinstance(tensor.get(name), kind)
        for tensor in described
        for name, kind in fields.items()
    ):
        return tuple(described)
    return ()
