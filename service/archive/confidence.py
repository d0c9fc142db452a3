"""Fits the confidence of a model on labelled images: temperature, sets and unknown images.

The conformal scores and the expected calibration error are a line or two each, which netcal, MAPIE
and torchcp would wrap in estimators, datasets and (netcal) a probabilistic programming language.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino
import torch
from numpy.typing import NDArray
from torch import nn

from handler.confidence import TINY, calibrate, describe_answer, describe_pixels
from handler.errors import InvalidModel, InvalidSettings, SetupError
from handler.model_card import INT8_FILE, OPENVINO_FILE, ConfidenceFacts, InputTransform
from handler.torch_engine import TorchEager
from service.archive.calibration import CalibrationSet, read_calibration
from service.archive.inference import answer, compile_for_one
from service.plan import PackagePlan

MINIMUM_IMAGES = 100  # so that every level up to 0.99 can be asked for: 0.99 < 100 / 101
TEMPERATURES = 0.05, 20.0
BINS = 15
FOLDS = 5
FALSE_ALARMS = 0.05  # of images like those of the calibration, called unknown
REQUIREMENTS = "requirements-confidence.txt"

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Fitted:
    """What an archive gets: the card's part, and the arrays of CONFIDENCE_FILE."""

    facts: ConfidenceFacts
    arrays: dict[str, Floats]
    probabilities: Floats  # [N, C], calibrated, of the images
    distances: Floats  # [N], of each image from the others


def import_libraries() -> tuple[Any, Any]:
    """sklearn.covariance and scipy.optimize. Raises SetupError if they are not installed."""
    try:
        from scipy import optimize
        from sklearn import covariance
    except ImportError as exc:
        raise SetupError(
            "--calibrate needs scikit-learn and SciPy, which are not installed: "
            f"pip install -r {REQUIREMENTS}"
        ) from exc
    return covariance, optimize


def read_labelled(
    plan: PackagePlan, transform: InputTransform, classes: int
) -> CalibrationSet | None:
    """The images of --calibrate, if it is given.

    Raises SetupError if they are too few, or have no labels of this model.
    """
    folder = plan.calibrate
    if folder is None:
        return None
    import_libraries()
    if plan.calibration and folder.resolve() == plan.calibration.resolve():
        raise InvalidSettings(
            f"--calibrate {folder} is the folder of --calibration: int8 was fitted on these "
            "images, so its answers to them are no measure; give others"
        )
    labelled = read_calibration(folder, transform, plan.settings, "--calibrate")
    if labelled.labels is None:
        raise InvalidModel(f"--calibrate {folder}: it needs a labels.csv with file and class_id")
    if len(labelled.images) < MINIMUM_IMAGES:
        raise InvalidModel(
            f"--calibrate {folder}: it needs {MINIMUM_IMAGES} labelled images or more, and has "
            f"{len(labelled.images)}"
        )
    if (largest := max(labelled.labels)) >= classes:
        raise InvalidModel(
            f"--calibrate {folder}: labels.csv has class_id {largest}, and the model has {classes} "
            f"classes, 0 to {classes - 1}"
        )
    return labelled


def fit(
    network: nn.Module,
    transform: InputTransform,
    converted: Mapping[str, openvino.Model],
    labelled: CalibrationSet,
) -> Fitted:
    """Fit on the answers of the model that serves: int8 if it is among the converted, else fp32."""
    if converted:
        name = INT8_FILE if INT8_FILE in converted else OPENVINO_FILE
        engine = f"openvino-{'int8' if name == INT8_FILE else 'fp32'}"
        core = openvino.Core()
        compiled = compile_for_one(converted[name], labelled.images[0].shape, core)
        probabilities = answer(compiled, labelled.images)
    else:
        reference = TorchEager(network, transform)
        engine = reference.name
        images = map(torch.from_numpy, labelled.images)
        probabilities = np.concatenate(
            [reference.probabilities(image[None]).numpy() for image in images]
        )
    looks = np.stack([describe_pixels(image) for image in labelled.images])
    return fit_answers(probabilities, np.array(labelled.labels), looks, engine)


def fit_answers(probabilities: Floats, labels: Labels, looks: Floats, engine: str) -> Fitted:
    """Fit on probabilities [N, C], indices of true classes [N] and what images look like [N, 24].

    `engine` is the name of the one that gave the probabilities.
    """
    temperature = find_temperature(probabilities, labels)
    calibrated = calibrate(probabilities, temperature)
    described = np.hstack([looks, [describe_answer(row) for row in calibrated]])
    center, precision = fit_gaussian(described)
    held_out = held_out_distances(described)
    facts = ConfidenceFacts(
        images=len(labels),
        engine=engine,
        temperature=temperature,
        ece_before=round(calibration_error(probabilities, labels), 4),
        ece_after=round(calibration_error(calibrated, labels), 4),
        unknown_limit=find_limit(held_out),
    )
    scores = conformal_scores(calibrated, labels)
    arrays = {"scores": scores, "center": center, "precision": precision}
    return Fitted(facts, arrays, calibrated, held_out)


def find_temperature(probabilities: Floats, labels: Labels) -> float:
    """The temperature under which the labels are likeliest (https://arxiv.org/abs/1706.04599)."""
    _, optimize = import_libraries()

    def loss(logarithm: float) -> float:
        right = calibrate(probabilities, float(np.exp(logarithm)))[np.arange(len(labels)), labels]
        return -float(np.log(np.maximum(right, TINY)).mean())

    found = optimize.minimize_scalar(loss, bounds=np.log(TEMPERATURES), method="bounded")
    return round(float(np.exp(found.x)), 4)


def conformal_scores(calibrated: Floats, labels: Labels) -> Floats:
    """Ascending [N]: one minus the probability of the true class."""
    return np.sort(1 - calibrated[np.arange(len(labels)), labels])


def calibration_error(probabilities: Floats, labels: Labels) -> float:
    """The expected calibration error: |accuracy - confidence|, averaged over equal bins."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    surplus = np.bincount(bins, right - confidence, BINS)
    return float(np.abs(surplus).sum() / len(labels))


def fit_gaussian(described: Floats) -> tuple[Floats, Floats]:
    """Mean [D] and inverse covariance [D, D] of rows [N, D]; Ledoit-Wolf's, for N is small."""
    covariance, _ = import_libraries()
    center, spread = described.mean(axis=0), described.std(axis=0) + 1e-6
    standardised = (described - center) / spread  # or the largest numbers decide the shrinkage
    precision = covariance.LedoitWolf().fit(standardised).precision_ / np.outer(spread, spread)
    return center, precision.astype(np.float32)


def distances(described: Floats, center: Floats, precision: Floats) -> Floats:
    """The squared Mahalanobis distance of each row."""
    offsets = described - center
    found: Floats = np.einsum("ni,ij,nj->n", offsets, precision, offsets)
    return found


def held_out_distances(described: Floats) -> Floats:
    """[N]: the distance of each row [N, D] from the other folds.

    From a Gaussian that was fitted on the row itself it would be too near.
    """
    found = np.empty(len(described), np.float32)
    for fold in range(FOLDS):
        own = np.s_[fold::FOLDS]
        gaussian = fit_gaussian(np.delete(described, own, axis=0))
        found[own] = distances(described[own], *gaussian)
    return found


def find_limit(held_out: Floats) -> float:
    """The distance that FALSE_ALARMS of images like those of the calibration exceed."""
    rank = int(np.ceil((len(held_out) + 1) * (1 - FALSE_ALARMS)))
    return round(float(np.sort(held_out)[rank - 1]), 4)
