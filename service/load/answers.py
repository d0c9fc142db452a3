"""Checks of an answer: its shape, its probabilities, and the class of the image."""

from collections.abc import Mapping, Sequence
from typing import Any

NEAR_TIE = 0.95  # of the best confidence: batches of other sizes round differently


class Expectations:
    """The top-1 class of each image: as given, or as it was first answered.

    The classes of untrained weights are near ties, which say nothing: `classes` leaves them out.
    """

    def __init__(self, given: Mapping[str, str] | None = None, *, classes: bool = True) -> None:
        self.top_classes: dict[str, str] = dict(given or {})
        self._classes = classes

    def problem(self, name: str, predictions: Sequence[tuple[str, float]]) -> str | None:
        """What is wrong with an answer, in a word; None for a good one."""
        if not predictions:
            return "NoPredictions"
        confidences = [confidence for _, confidence in predictions]
        if not all(0 <= confidence <= 1 for confidence in confidences):
            return "NoProbabilities"
        if confidences != sorted(confidences, reverse=True):
            return "Unsorted"
        expected = self.top_classes.setdefault(name, predictions[0][0])
        near = [label for label, p in predictions if p >= NEAR_TIE * confidences[0]]
        return None if expected in near or not self._classes else "WrongClass"


def read_predictions(document: Any) -> list[tuple[str, float]]:
    """Labels and confidences, best first, in the shapes that classifiers answer in.

    Ours is {"predictions": [{"class": …, "confidence": …}]}, or {"results": […]} for several
    images: then those of the first are returned, and none unless all images were classified.
    TorchServe's image_classifier answers {label: confidence}.
    """
    if isinstance(document, Mapping) and isinstance(document.get("results"), list):
        if document.get("status") != "success":
            return []
        document = document["results"][0]
    if isinstance(document, Mapping) and "predictions" in document:
        document = document["predictions"]
    try:
        if isinstance(document, Mapping):
            return [(str(label), float(confidence)) for label, confidence in document.items()]
        return [(str(entry["class"]), float(entry["confidence"])) for entry in document]
    except (LookupError, TypeError, ValueError):
        return []


def without_tensor_header(content: bytes, headers: Mapping[str, str]) -> bytes:
    """The text in an answer of Triton's binary protocol: one output, of one element.

    A JSON header, the length of the element in four bytes, and the element.
    """
    length = headers.get("Inference-Header-Content-Length")
    return content if length is None else content[int(length) + 4 :]
