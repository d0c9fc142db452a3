"""A worker's handler, asked as TorchServe asks it."""

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from ts.context import Context, RequestProcessor

from handler.collector import Metrics
from handler.engine import Engine
from handler.image_classifier import ImageClassifier
from tests.drawing import encode, noise

JPEG = encode(noise((300, 200)), "JPEG")
PNG = encode(noise((200, 300), seed=1), "PNG")
JSON = {"Content-Type": "application/json"}
MULTIPART = {"Content-Type": "multipart/form-data; boundary=x"}
QUICK = {"device": "cpu", "threads": 1, "warmup_batches": 0}


@dataclass
class Reply:
    """What TorchServe would send to one client."""

    status: int
    phrase: str
    content_type: str | None
    body: Any  # what the JSON says, or bytes that are not all JSON
    headers: Mapping[str, str]

    @property
    def error(self) -> str | None:
        return self.body.get("type")


class Fake(Engine):
    """An engine that answers by colour: class 0, 1 or 2 for red, green or blue."""

    name, precision, device, max_forward = "fake-fp32", "fp32", "cpu", 4

    def __init__(self, fail: Callable[[Tensor], Tensor] | None = None) -> None:
        self.batches: list[int] = []
        self.fail = fail

    def probabilities(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        if self.fail:
            return self.fail(images)
        return (images.float().mean(dim=(2, 3)) / 25).softmax(dim=1)


def broken(_: Tensor) -> Tensor:
    raise RuntimeError("cuDNN says no at 0x7f00 in /opt/secret")


def not_a_number(images: Tensor) -> Tensor:
    return torch.full((len(images), 3), float("nan"))


def one_too_few(images: Tensor) -> Tensor:
    return torch.full((len(images) - 1, 3), 1 / 3)


def make_context(folder: Path, config: Mapping[str, Any] | None = None, **settings: Any) -> Context:
    """A worker's context as TorchServe makes it."""
    yaml = dict(config or {}) | {"handler": QUICK | settings}
    manifest = {"model": {"modelVersion": "1.0", "modelName": "birds"}}
    return Context("birds", str(folder), manifest, 8, None, "0.12.0", model_yaml_config=yaml)


def start(
    folder: Path, config: Mapping[str, Any] | None = None, **settings: Any
) -> ImageClassifier:
    classifier = ImageClassifier()
    classifier.initialize(make_context(folder, config, **settings))
    return classifier


def ask(
    classifier: ImageClassifier,
    *rows: Mapping[str, Any],
    headers: Mapping[str, Any] | Sequence[Mapping[str, Any]] = (),
    settle: bool = True,
) -> list[Reply]:
    """Hand over a batch as TorchServe does; `headers` are for all rows, or one for each.

    Unless it is to `settle`, the batch is not yet counted and logged.
    """
    each = [headers] * len(rows) if isinstance(headers, Mapping) else headers or [{}] * len(rows)
    context = classifier.context
    context.request_ids = {index: f"id-{index}" for index in range(len(rows))}
    context.request_processor = [RequestProcessor(dict(one)) for one in each]
    bodies = classifier.handle(list(rows), context)
    if settle:
        classifier.accounts.settle()
    assert len(bodies) == len(rows)
    return [
        Reply(status, phrase, content_type, body, context.get_response_headers(index))
        for index, sent in enumerate(bodies)
        for status, phrase in [context.get_response_status(index)]
        for content_type in [context.get_response_content_type(index)]
        for body in [sent if content_type == "application/octet-stream" else json.loads(sent)]
    ]


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def log(caplog: pytest.LogCaptureFixture, event: str) -> list[dict[str, Any]]:
    messages = [record.getMessage() for record in caplog.records if record.name == "classifier"]
    lines = map(json.loads, "\n".join(messages).splitlines())
    return [line for line in lines if line["event"] == event]


def without_times(answer: dict[str, Any]) -> dict[str, Any]:
    metadata = answer["metadata"] | {"inference_time": 0, "request_id": ""}
    return answer | {"metadata": metadata}


class Counted(dict[tuple[str, ...], float]):
    """What a classifier counts from now on, without what stays at 0."""

    def __init__(self, classifier: ImageClassifier) -> None:
        def emit(name: str, increment: float, labels: Sequence[str]) -> None:
            if increment:
                self[(name.removeprefix("classifier_"), *labels[2:])] = increment

        self._metrics = classifier.accounts.counts = Metrics(emit, "birds", "1.0")

    def read(self, name: str) -> dict[str, float]:
        """Values of the series of a name by their last label."""
        self._metrics.flush()
        return {key[-1]: value for key, value in self.items() if key[0] == name}
