"""What the peers' toy model says of an image: the colours that it has most of."""

from typing import Any

INPUTS: list[dict[str, Any]] = [{"name": "image", "datatype": "BYTES", "shape": [-1]}]
OUTPUTS: list[dict[str, Any]] = [
    {"name": "label", "datatype": "BYTES", "shape": [-1, 1]},
    {"name": "class_id", "datatype": "INT64", "shape": [-1, 1]},
    {"name": "confidence", "datatype": "FP32", "shape": [-1, 1]},
    {"name": "probabilities", "datatype": "FP32", "shape": [-1, 3]},
]
LABELS = ["red", "green", "blue"]


def colours(means: list[list[float]]) -> dict[str, list[Any]]:
    """Mean red, green and blue of images -> the outputs' values, a row for each image."""
    rows = [[value / (sum(mean) or 1.0) for value in mean] for mean in means]
    best = [row.index(max(row)) for row in rows]
    return {
        "label": [LABELS[index] for index in best],
        "class_id": best,
        "confidence": [max(row) for row in rows],
        "probabilities": rows,
    }
