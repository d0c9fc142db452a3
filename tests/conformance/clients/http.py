"""Plain HTTP with `requests`, and what an answer and a refusal must look like in both protocols."""

import json
from typing import Any

import requests

from tests.conformance.checks import Json, Subject, expect, flat

CLIENT = f"requests {requests.__version__}"
SECONDS = 30
UNKNOWN = "no-such-model"
LENGTH = "Inference-Header-Content-Length"


def get(subject: Subject, path: str) -> requests.Response:
    return requests.get(subject.url + path, timeout=SECONDS)


def post(subject: Subject, path: str, body: Any, **headers: str) -> requests.Response:
    """POST a JSON document, or bytes as they are."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"Content-Type": "application/json"} | headers
    return requests.post(subject.url + path, data=content, headers=sent, timeout=SECONDS)


def infer(subject: Subject, body: Any, **headers: str) -> requests.Response:
    return post(subject, f"/v2/models/{subject.model}/infer", body, **headers)


def infer_binary(
    subject: Subject, described: Json, data: bytes, length: str | None = None
) -> requests.Response:
    head = json.dumps(described).encode()
    sizes = {"Content-Type": "application/octet-stream", LENGTH: length or str(len(head))}
    return infer(subject, head + data, **sizes)


def answered(answer: requests.Response) -> Json:
    """The JSON object of a 200."""
    expect(answer.status_code == 200, f"{answer.status_code}: {answer.text[:200]}")
    kind = answer.headers.get("Content-Type", "none")
    expect(kind.partition(";")[0] == "application/json", f"content type {kind}")
    content = answer.json()
    expect(isinstance(content, dict), f"{str(content)[:100]} is not an object")
    return dict(content)


def refused(answer: requests.Response, *statuses: int) -> None:
    """An error that is the client's own, in the form that the protocols give it."""
    allowed = answer.status_code in (statuses or range(400, 500))
    expect(allowed, f"{answer.status_code}: {answer.text[:150]}")
    kind = answer.headers.get("Content-Type", "none")
    expect(kind.partition(";")[0] == "application/json", f"{answer.status_code}, as {kind}")
    content = answer.json()
    expect(
        isinstance(content, dict) and isinstance(content.get("error"), str),
        f"{answer.status_code}, but no text under `error`: {answer.text[:150]}",
    )


def outputs_of(content: Json) -> dict[str, Json]:
    """The outputs of an answer by name, in their order; their data flat."""
    outputs = content.get("outputs")
    expect(isinstance(outputs, list) and outputs, f"outputs: {str(outputs)[:100]}")
    for tensor in outputs or ():
        for name, kind in {"name": str, "datatype": str, "shape": list, "data": list}.items():
            expect(isinstance(tensor.get(name), kind), f"no {name} in {str(tensor)[:100]}")
    return {
        tensor["name"]: {
            "datatype": tensor["datatype"],
            "shape": tensor["shape"],
            "data": flat(tensor["data"]),
        }
        for tensor in outputs or ()
    }
