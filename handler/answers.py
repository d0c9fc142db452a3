"""Probabilities and errors to the JSON that clients read."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from handler.errors import RequestError

Answer = dict[str, Any]
MAX_HEADER_LENGTH = 1000  # of the best classes: nginx takes 4 KB of headers, all of them together


def best_classes(
    probabilities: NDArray[np.float32], top_k: int, labels: Sequence[str]
) -> list[Answer]:
    """Finite float32 [C] -> the `top_k` likeliest classes, best first."""
    candidates = np.arange(len(probabilities))
    if top_k < len(probabilities):  # sort those alone that are no less than the last of the best
        least = np.partition(probabilities, -top_k)[-top_k]
        candidates = np.flatnonzero(probabilities >= least)
    # Stable, so that classes of equal probability keep their order whatever top_k is.
    order = (-probabilities[candidates]).argsort(kind="stable")[:top_k]
    return [
        {
            "class": labels[class_id],
            "class_id": class_id,
            "confidence": round(float(probabilities[class_id]), 6),
        }
        for class_id in candidates[order].tolist()
    ]


def success(predictions: list[Answer], metadata: Answer) -> Answer:
    return {"status": "success", "predictions": predictions, "metadata": metadata}


def failure(error: RequestError) -> Answer:
    return {
        "status": "error",
        "code": error.status,
        "type": type(error).__name__,
        "message": str(error),
    }


def combine(results: list[Answer]) -> tuple[int, Answer]:
    """HTTP status and answer of a request that gets a list of results.

    The status is 200 if at least one image was classified, else the highest of their errors'.
    """
    codes = [result["code"] for result in results if result["status"] == "error"]
    if not codes:
        return 200, {"status": "success", "results": results}
    if len(codes) < len(results):
        return 200, {"status": "partial", "results": results}
    return max(codes), {"status": "error", "results": results}


def best_class_ids(results: Sequence[Answer]) -> str:
    """The top-1 class index of each image, and `-` for one that failed: `0,17,-`.

    Empty if that would be too long for a header.
    """
    text = ",".join(
        str(result["predictions"][0]["class_id"]) if result["status"] == "success" else "-"
        for result in results
    )
    return text if len(text) <= MAX_HEADER_LENGTH else ""


def encode(answer: Answer) -> bytes:
    """UTF-8 JSON. TorchServe would indent a dict, and lose the batch to a numpy type in it."""
    return orjson.dumps(answer)
