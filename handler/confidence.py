"""What labelled images have taught packaging: calibrated probabilities, sets and unknown images.

`service/archive/confidence.py` computes these numbers, here they are applied. How each was chosen
is in docs/trust.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch import Tensor

from handler.answers import Answer
from handler.errors import MalformedRequest
from handler.model_card import ModelCard

CONFIDENCE_FILE = "confidence.safetensors"
TINY = 1e-30  # a smaller probability says nothing more, and 0 has no logarithm
SCALES = 4  # halvings of an image
OPPONENTS = np.array([[1 / 3, 1 / 3, 1 / 3], [0.5, -0.5, 0], [0.25, 0.25, -0.5]], np.float32)
LEAST_CONTRAST = 0.5  # of 255: what rounding makes

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Confidence:
    """The numbers of an archive that was packaged with --calibrate."""

    temperature: float
    scores: Floats  # [N], ascending: 1 - calibrated probability of each image's true class
    center: Floats  # [D] of what describes the images, see below
    precision: Floats  # [D, D]: the inverse of their covariance
    limit: float  # the distance over which an image is unknown

    @classmethod
    def read(cls, card: ModelCard, model_dir: Path) -> "Confidence | None":
        """That of an unpacked archive; None if it was not calibrated."""
        if card.confidence is None:
            return None
        arrays = load_file(model_dir / CONFIDENCE_FILE)
        return cls(card.confidence.temperature, limit=card.confidence.unknown_limit, **arrays)

    def likely(self, probabilities: Floats, level: float) -> list[int]:
        """The classes that hold the true one in `level` of cases, likeliest first, at least one.

        `probabilities` are calibrated, [C]. Split conformal prediction with one minus the
        probability as the score: https://arxiv.org/abs/1609.00451 (LABEL), whose sets are the
        smallest.
        """
        rank = ceil(round((len(self.scores) + 1) * level, 6))  # 101 * 0.99 is a little less
        if rank > len(self.scores):
            found = np.arange(len(probabilities))
        else:
            found = np.flatnonzero(1 - probabilities <= self.scores[rank - 1])
        order = (-probabilities[found]).argsort(kind="stable")
        return [int(number) for number in found[order]] or [int(probabilities.argmax())]

    def judge(
        self,
        probabilities: Floats,
        level: float | None,
        pixels: Tensor | None,
        labels: Sequence[str],
    ) -> Answer:
        """What an answer says besides: the set for a level, and with pixels whether it is unknown.

        `probabilities` are calibrated, [C]; the pixels uint8 [3, H, W].
        """
        judgement: Answer = {}
        if level is not None:
            likely = self.likely(probabilities, level)
            judgement["set"] = [{"class": labels[one], "class_id": one} for one in likely]
        if pixels is not None:
            judgement["unknown"] = self.distance(pixels.cpu().numpy(), probabilities) > self.limit
        return judgement

    def distance(self, pixels: NDArray[np.uint8], probabilities: Floats) -> float:
        """How far an image [3, H, W], as the model takes it, is from those of the calibration.

        Mahalanobis', squared; `probabilities` are calibrated, [C].
        """
        described = np.concatenate([describe_pixels(pixels), describe_answer(probabilities)])
        offset = described - self.center
        return float(offset @ self.precision @ offset)


def calibrate(probabilities: Floats, temperature: float) -> Floats:
    """Probabilities [B, C] as if softmax had been given the logits over the temperature."""
    logits = np.log(np.maximum(probabilities, np.float32(TINY))) / np.float32(temperature)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    calibrated = powers / powers.sum(axis=1, keepdims=True)
    return calibrated.astype(np.float32, copy=False)


def describe_pixels(pixels: NDArray[np.uint8]) -> Floats:
    """What an image [3, H, W] looks like, in 24 numbers.

    Contrast and its unevenness at each scale, of brightness, of red to green and of yellow to blue:
    photographs have these in narrow ratios, whatever they show; noise, text and drawings have not.
    """
    numbers = []
    levels: NDArray[Any] = np.tensordot(OPPONENTS, pixels.astype(np.float32), 1)  # [3, H, W]
    for _ in range(SCALES):
        _, height, width = levels.shape
        even = levels[:, : height // 2 * 2, : width // 2 * 2]
        a, b, c, d = (even[:, y::2, x::2] for y in (0, 1) for x in (0, 1))
        details = np.stack([a - b + c - d, a + b - c - d, a - b - c + d], 1) / 4  # Haar's wavelet
        details = details.reshape(3, -1)
        mean = np.abs(details).mean(axis=1) + LEAST_CONTRAST
        spread = np.sqrt(np.square(details).mean(axis=1)) + LEAST_CONTRAST
        numbers += [np.log(mean), np.log(spread / mean)]
        levels = (a + b + c + d) / 4
    return np.concatenate(numbers)


def describe_answer(probabilities: Floats) -> Floats:
    """How sure the model is [C], in 4 numbers, of the logarithms of its probabilities.

    The largest over their mean, their spread, the entropy, and the largest.
    """
    logarithms = np.log(np.maximum(probabilities, np.float32(TINY)))
    largest = logarithms.max()
    entropy = -(probabilities * logarithms).sum()
    return np.array([largest - logarithms.mean(), logarithms.std(), entropy, largest], np.float32)


def check_asked(confidence: Confidence | None, level: float | None, unknown: bool) -> None:
    """Raise MalformedRequest for a request of what the archive does not have."""
    if confidence is None and (level is not None or unknown):
        raise MalformedRequest(
            f"{'unknown' if level is None else 'set'} needs an archive that was calibrated: "
            "package it with ./scripts/package --calibrate DIR"
        )
