"""What a log line or an answer says about how an image was classified."""

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from handler.errors import SetupError

MAX_BYTES = 16 * 2**20  # of an answer with every class of many images


@dataclass(frozen=True)
class Best:
    """The top-1 class of an image."""

    name: str
    confidence: float

    def __str__(self) -> str:
        return f"{self.name} {self.confidence:.6f}"


@dataclass(frozen=True, kw_only=True)
class Logged:
    """An answer, and how it was computed; None where nothing says."""

    best: Best
    model: str
    version: str
    weights: str  # their name
    engine: str | None  # such as "openvino-bf16"
    decode: str  # "exact" or "fast"
    archive: str | None = None  # the first digits of the digest of its inputs
    decoder: str | None = None
    libraries: Mapping[str, str] = field(default_factory=dict)
    image_bytes: int | None = None
    image_sha256: str | None = None
    images: int = 1  # of the request; the answer is that of the first that was classified


def read_logged(source: str, image_name: str) -> Logged:
    """A log line or an answer: the JSON itself, a file with it, or `-` for stdin.

    Of an answer with several images, the one whose filename is `image_name`. Raises SetupError.
    """
    facts = _read_json(source)
    try:
        if facts.get("event") == "request":
            return _of_line(facts)
        if "results" in facts:
            facts = _of_name(facts["results"], image_name)
        if "metadata" in facts:
            return _of_answer(facts)
    except (LookupError, TypeError, ValueError, AttributeError) as exc:
        raise SetupError(f"the JSON is no line of a request, and no answer: {exc!r}") from exc
    raise SetupError(
        'the JSON has neither "event": "request", as a line of the log has, nor the "metadata" of '
        "an answer"
    )


def _read_json(source: str) -> dict[str, Any]:
    if source.lstrip().startswith("{"):
        text = source
    else:
        try:
            with sys.stdin.buffer if source == "-" else Path(source).open("rb") as stream:
                text = stream.read(MAX_BYTES + 1).decode("utf-8", "replace")
        except OSError as exc:
            raise SetupError(f"{source} cannot be read: {exc.strerror}") from exc
    if len(text) > MAX_BYTES:
        raise SetupError(f"more than {MAX_BYTES} bytes: give the line of one request")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as exc:
        lines = len(text.splitlines())
        several = f"{lines} lines: give the one of the request" if lines > 1 else "this is not JSON"
        raise SetupError(
            f"one line of the log in JSON, or one answer, is needed; {several}"
        ) from exc
    if not isinstance(found, dict):
        raise SetupError("a line of the log and an answer are JSON objects, and this is none")
    return found


def _of_line(facts: Mapping[str, Any]) -> Logged:
    if facts["top_class"] is None:
        raise SetupError(
            f"the request has no answer to compute again: status {facts['status']}, "
            f"{facts['error']}"
        )
    images = int(facts["images"])
    return _logged(
        Best(str(facts["top_class"]), float(facts["confidence"])),
        facts,
        archive=facts.get("archive"),
        decoder=facts.get("decoder"),
        libraries=dict(facts.get("libraries") or {}),
        image_bytes=facts.get("image_bytes") if images == 1 else None,
        image_sha256=facts.get("image_sha256"),
        images=images,
    )


def _of_answer(answer: Mapping[str, Any]) -> Logged:
    best = answer["predictions"][0]
    return _logged(Best(str(best["class"]), float(best["confidence"])), answer["metadata"])


def _logged(best: Best, facts: Mapping[str, Any], **more: Any) -> Logged:
    """What line and answer say alike, and more that only the line says."""
    engine = facts.get("engine")
    if engine and not re.fullmatch(r"(openvino|torch|cuda)-(fp32|bf16|fp16|int8)", engine):
        raise SetupError(f"the engine {engine!r} is not one of this release")
    return Logged(
        best=best,
        model=str(facts["model"]),
        version=str(facts["version"]),
        weights=str(facts["weights"]),
        engine=engine,
        decode="fast" if facts.get("decode") == "fast" else "exact",
        **more,
    )


def _of_name(results: list[dict[str, Any]], image_name: str) -> dict[str, Any]:
    found = [
        result
        for result in results
        if result.get("metadata", {}).get("filename") == image_name or len(results) == 1
    ]
    if len(found) != 1:
        raise SetupError(
            f"the answer has {len(results)} images, {len(found)} of them with the filename "
            f"{image_name!r}: give the entry of `results` that is meant"
        )
    return found[0]
