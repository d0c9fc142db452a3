"""What a worker counts of the images that it answers, against the reference of its archive."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from handler.accounting import SAMPLE_SECONDS, Accounts, describe_worker
from handler.collector import Metrics
from handler.confidence import Confidence
from handler.drift import Bins, Reference, brightness
from handler.image_classifier import ImageClassifier
from handler.metrics import DRIFT, DRIFT_REFERENCE, DRIFT_REFERENCE_IMAGES
from handler.model_card import CARD_FILE, ModelCard
from tests.drawing import BLUE, RED, encode, plain
from tests.unit.handler.worker import Counted, Fake, ask, b64, start
from tests.unit.tiny import tiny_card

pytestmark = pytest.mark.usefixtures("isolation")
REFERENCE = Reference(
    200,
    {
        "confidence": Bins((0.5, 0.99), (0.25, 0.5, 0.25)),
        "class": Bins((0.0,), (0.5, 0.5)),
        "brightness": Bins((90.0, 95.0), (0.25, 0.25, 0.5)),
        "size": Bins((3072.0,), (0.5, 0.5)),
    },
)
DARK, BRIGHT = (encode(plain(colour), "PNG") for colour in (RED, BLUE))  # mean 93.3 and 103.3


@pytest.fixture
def folder(model_dir: Path, tmp_path: Path) -> Path:
    """An unpacked archive with a reference."""
    for path in model_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    card = replace(ModelCard.read(tmp_path), reference=REFERENCE)
    (tmp_path / CARD_FILE).write_text(card.to_json())
    return tmp_path


def worker(folder: Path, **settings: Any) -> ImageClassifier:
    classifier = start(folder, **settings)
    classifier.engine = Fake()
    return classifier


def drift(counted: Counted) -> dict[tuple[str, ...], float]:
    counted.read("drift_images_total")
    return {key[1:]: value for key, value in counted.items() if key[0] == "drift_images_total"}


def test_images_are_counted_by_bin(folder: Path) -> None:
    classifier = worker(folder)
    counted = Counted(classifier)
    images = [b64(DARK), b64(BRIGHT), b64(encode(plain(RED, (640, 480)), "PNG")), b64(b"damaged")]
    ask(classifier, {"body": {"images": images}}, {"body": DARK})
    assert drift(counted) == {
        ("confidence", "+Inf"): 4,
        ("class", "0"): 3,  # red
        ("class", "+Inf"): 1,  # blue
        ("brightness", "95"): 3,
        ("brightness", "+Inf"): 1,
        ("size", "3072"): 3,  # a bound belongs to its bin
        ("size", "+Inf"): 1,
    }


def test_probes_are_not_counted(folder: Path) -> None:
    classifier = worker(folder)
    counted = Counted(classifier)
    ask(classifier, {"body": DARK}, headers={"X-Probe": "1"})
    assert drift(counted) == {}


def test_the_distance_is_taken_of_an_image_now_and_then(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = worker(folder)
    signals = REFERENCE.signals | {"distance": Bins((1e6,), (0.5, 0.5))}
    reference = replace(REFERENCE, signals=signals)
    confidence = Confidence(
        1.0, np.zeros(1, np.float32), np.zeros(28, np.float32), np.eye(28, dtype=np.float32), 1.0
    )
    accounts = Accounts(classifier.metrics, {}, False, reference, confidence)
    classifier.accounts, now = accounts, 1e9
    counted = Counted(classifier)
    monkeypatch.setattr("handler.image_classifier.time", lambda: now)
    ask(classifier, {"body": DARK}, headers={"X-Probe": "1"})
    for _ in range(3):
        ask(classifier, {"body": DARK}, {"body": BRIGHT})
    now += SAMPLE_SECONDS
    ask(classifier, {"body": b"damaged"}, {"body": BRIGHT})
    now -= 3600  # the clock was set
    ask(classifier, {"body": DARK})
    assert drift(counted)["distance", "1000000"] == 3


def test_the_brightness_of_a_cached_image_is_not_known(folder: Path) -> None:
    classifier = worker(folder, cache_bytes=10**6)
    counted = Counted(classifier)
    ask(classifier, {"body": DARK})
    ask(classifier, {"body": DARK})
    found = drift(counted)
    assert (found["size", "3072"], found["brightness", "95"]) == (2, 1)


def test_without_a_reference_nothing_is_counted(classifier: ImageClassifier) -> None:
    counted = Counted(classifier)
    [_] = ask(classifier, {"body": DARK})
    assert drift(counted) == {}


def test_the_reference_is_told_at_the_start() -> None:
    """Each bin is there at 0, so that increase() sees its first image."""
    told = dict[tuple[str, ...], float]()

    def emit(name: str, value: float, labels: Sequence[str]) -> None:
        told[(name, *labels[2:])] = value

    counts = Metrics(emit, "birds", "1.0")
    describe_worker(counts, replace(tiny_card(), reference=REFERENCE), Fake(), None)
    counts.flush()
    assert told[DRIFT_REFERENCE_IMAGES,] == 200
    assert told[DRIFT_REFERENCE, "confidence", "0.99"] == 0.5
    counted = {key[1:] for key, value in told.items() if key[0] == DRIFT and value == 0}
    assert counted == {key[1:] for key in told if key[0] == DRIFT_REFERENCE}
    assert len(counted) == 10


def test_a_card_with_a_reference_is_read_again() -> None:
    card = replace(tiny_card(), reference=REFERENCE)
    assert ModelCard.from_json(card.to_json()) == card
    assert Reference.from_facts(json.loads(json.dumps(asdict(REFERENCE)))) == REFERENCE


def test_brightness_is_the_mean_level() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, 224, 224), dtype=np.uint8)
    assert brightness(pixels) == pytest.approx(pixels.mean(), abs=5)
    assert brightness(np.full((3, 224, 224), 7, np.uint8)) == 7.0
