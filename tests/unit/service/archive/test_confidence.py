"""Fitting of --calibrate on drawn answers whose truth is known, and packaging with it."""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import betabinom

from handler.confidence import Confidence, calibrate
from handler.errors import InvalidModel, InvalidSettings
from handler.model_card import ModelCard
from handler.networks import build_network, get_recipe, input_transform
from service.archive import packaging
from service.archive.confidence import (
    calibration_error,
    distances,
    find_limit,
    find_temperature,
    fit_answers,
    fit_gaussian,
    held_out_distances,
)
from service.archive.conversion import to_openvino
from service.archive.digest import SEED, is_current
from service.archive.mar import read_card
from service.archive.packaging import package
from tests.drawing import encode, noise
from tests.unit.service.planning import MODEL, planned

CLASSES = 20


def drawn(seed: int, count: int, sharpness: float = 1.0) -> tuple[NDArray[Any], NDArray[Any]]:
    """Probabilities of a model that is too sure by `sharpness`, and classes as they really fall."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (count, CLASSES))
    true = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (true.cumsum(axis=1) > rng.random((count, 1))).argmax(axis=1)
    given = np.exp(sharpness * logits)
    return (given / given.sum(axis=1, keepdims=True)).astype(np.float32), labels


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 2.5])
def test_the_temperature_is_found_and_mends_the_confidence(sharpness: float) -> None:
    probabilities, labels = drawn(0, 4000, sharpness)
    temperature = find_temperature(probabilities, labels)
    assert temperature == pytest.approx(sharpness, rel=0.06)
    assert calibration_error(calibrate(probabilities, temperature), labels) < 0.025
    if sharpness != 1:
        assert calibration_error(probabilities, labels) > 0.1


def test_the_calibration_error_by_hand() -> None:
    """Two answers at 0.9 of which one is right, two at 0.6 that are right."""
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]], np.float32)
    error = calibration_error(probabilities, np.array([0, 1, 0, 0]))
    assert error == pytest.approx((2 * 0.4 + 2 * 0.4) / 4)


@pytest.mark.parametrize("level", [0.8, 0.9, 0.95])
def test_sets_hold_the_truth_as_often_as_asked(level: float) -> None:
    """Over 40 seeds; one misses 99.99 % of the distribution in one of 80 runs of other seeds."""
    n, m = 200, 500
    covered = []
    for seed in range(40):
        probabilities, labels = drawn(seed, n + m, 1.7)
        looks = np.random.default_rng(seed).normal(size=(n, 24)).astype(np.float32)
        fitted = fit_answers(probabilities[:n], labels[:n], looks, "drawn")
        confidence = Confidence(
            fitted.facts.temperature, limit=fitted.facts.unknown_limit, **fitted.arrays
        )
        calibrated = calibrate(probabilities[n:], confidence.temperature)
        sets = [confidence.likely(row, level) for row in calibrated]
        covered.append(sum(y in one for y, one in zip(labels[n:], sets, strict=True)))
    rank = int(np.ceil(round((n + 1) * level, 6)))
    low, high = betabinom.interval(0.9999, m, rank, n + 1 - rank)
    assert low <= min(covered) <= max(covered) <= high
    assert np.mean(covered) / m == pytest.approx(level, abs=0.015)


def test_few_images_are_no_reason_for_false_alarms() -> None:
    """In 28 dimensions, where the images themselves are far nearer than others like them."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(28, 28))
    alarms, found = [], []
    for _ in range(20):
        known, others = (
            (rng.normal(size=(count, 28)) @ mixing).astype(np.float32) for count in (100, 500)
        )
        limit, gaussian = find_limit(held_out_distances(known)), fit_gaussian(known)
        alarms.append((distances(others, *gaussian) > limit).mean())
        found.append((distances(others + 8 * mixing[0], *gaussian) > limit).mean())
    assert 0.01 < np.mean(alarms) < 0.07
    assert np.mean(found) > 0.5 > np.mean(alarms)


# --- Packaging


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labelled")
    lines = ["file,class_id"]
    for number in range(100):
        (folder / f"{number}.png").write_bytes(encode(noise(seed=number)))
        lines.append(f"{number}.png,{number % 3}")
    (folder / "labels.csv").write_text("\n".join(lines))
    return folder


def test_a_calibrated_archive(tmp_path: Path, labelled: Path) -> None:
    given = ["--calibrate", str(labelled), "--device", "cpu"]
    archive = package(planned(tmp_path, *given))
    with zipfile.ZipFile(archive) as content:
        card = ModelCard.from_json(content.read("model.json"))
        content.extractall(tmp_path / "unpacked")
    card.check_files(tmp_path / "unpacked")
    assert card.confidence
    assert (card.confidence.images, card.confidence.engine) == (100, "openvino-fp32")
    confidence = Confidence.read(card, tmp_path / "unpacked")
    assert confidence
    assert (np.diff(confidence.scores) >= 0).all()
    assert confidence.precision.shape == (28, 28)
    assert is_current(planned(tmp_path, *given))
    assert not is_current(planned(tmp_path, "--device", "cpu"))


def changed(labelled: Path, folder: Path, text: str | None, images: int = 100) -> Path:
    folder.mkdir()
    for number in range(images):
        (folder / f"{number}.png").write_bytes((labelled / f"{number}.png").read_bytes())
    if text is not None:
        (folder / "labels.csv").write_text(text)
    return folder


@dataclass
class Report:
    method: str = "none: a model in fp32"


@pytest.mark.parametrize(("seed", "engine"), [(SEED, "openvino-int8"), (1, "openvino-fp32")])
def test_an_int8_model_is_calibrated_if_workers_take_it(
    labelled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    seed: int,
    engine: str,
) -> None:
    """Of another seed it is another network, whatever its agreement on the images was."""

    def quantize(*_: object) -> tuple[openvino.Model, Report]:
        torch.manual_seed(seed)
        recipe = get_recipe(MODEL)
        return to_openvino(build_network(recipe, MODEL, 1000), input_transform(recipe)), Report()

    monkeypatch.setattr(packaging, "quantize", quantize)
    calibration = changed(labelled, tmp_path / "calibration", None)
    given = ["--calibration", str(calibration), "--calibrate", str(labelled), "--device", "cpu"]
    card = read_card(package(planned(tmp_path, *given)))
    assert card
    assert card.int8
    assert card.confidence
    assert card.confidence.engine == engine
    warned = "warning: int8 gives other answers to the golden images (the logits' error is "
    assert (warned in capsys.readouterr().err) == (engine == "openvino-fp32")


@pytest.mark.parametrize(
    ("class_id", "images", "message"),
    [
        (None, 100, "needs a labels.csv with file and class_id"),
        (0, 99, "needs 100 labelled images or more, and has 99"),
        (1000, 100, "has class_id 1000, and the model has 1000 classes, 0 to 999"),
    ],
)
def test_what_cannot_be_calibrated_with(
    labelled: Path, tmp_path: Path, class_id: int | None, images: int, message: str
) -> None:
    rows = [f"{number}.png,{class_id}" for number in range(images)]
    text = None if class_id is None else "\n".join(["file,class_id", *rows])
    folder = changed(labelled, tmp_path / "images", text, images)
    with pytest.raises(InvalidModel, match=message):
        package(planned(tmp_path / "store", "--calibrate", str(folder)))
    assert not (tmp_path / "store").exists()


def test_the_images_of_int8_are_refused(labelled: Path, tmp_path: Path) -> None:
    given = ["--calibration", str(labelled), "--calibrate", str(labelled)]
    with pytest.raises(InvalidSettings, match="is the folder of --calibration"):
        package(planned(tmp_path, *given))
