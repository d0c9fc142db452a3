"""Drift from images to the alert: a worker's counts, in the rules that are shipped."""

import random
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.numpy import save_file

from handler.collector import Metrics
from handler.confidence import CONFIDENCE_FILE, describe_pixels
from handler.images import read_picture
from handler.model_card import CARD_FILE
from handler.settings import Settings
from service.archive.calibration import CalibrationSet
from service.archive.confidence import fit_answers
from service.archive.reference import reference_of
from service.chaos.prometheus import MONITORING
from tests.drawing import encode
from tests.unit.handler.conftest import isolation  # noqa: F401 - a fixture
from tests.unit.handler.worker import Fake, ask, start
from tests.unit.tiny import make_model_dir, tiny_card

Series = dict[str, float]


def draw(
    seed: int, count: int, light: float = 1.0, largest: int = 300, grain: float = 0.0
) -> list[bytes]:
    """Clouds of all colours, of some sizes; with `grain` they have so much fine noise."""
    rng = random.Random(seed)
    drawn = []
    for _ in range(count):
        colour = tuple(round(light * rng.randrange(256)) for _ in range(3))
        size = rng.randrange(100, largest), rng.randrange(100, largest)
        image = Image.new("RGB", size, colour)
        clouds = bytes(round(light * rng.randrange(256)) for _ in range(48))
        shape = Image.frombytes("RGB", (4, 4), clouds).resize(size)
        image = Image.blend(image, shape, rng.uniform(0.1, 0.4))
        if grain:
            noise = Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1]))
            image = Image.blend(image, noise, grain)
        drawn.append(encode(image, "PNG"))
    return drawn


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unpacked archive that was calibrated with 200 images."""
    folder = make_model_dir(tmp_path_factory.mktemp("model"))
    card, rng = tiny_card(), np.random.default_rng(0)
    pictures = [read_picture(image, card.transform, Settings()) for image in draw(0, 200)]
    pixels = tuple(picture.pixels.numpy() for picture in pictures)
    labelled = CalibrationSet(pixels, None, tuple(picture.size for picture in pictures))
    probabilities = Fake().probabilities(torch.from_numpy(np.stack(pixels))).numpy()
    labels = np.array([rng.choice(len(row), p=row / row.sum()) for row in probabilities])
    looks = np.stack([describe_pixels(image) for image in pixels])
    fitted = fit_answers(probabilities, labels, looks, "fake-fp32")
    save_file(fitted.arrays, folder / CONFIDENCE_FILE)
    reference = reference_of(labelled, fitted.probabilities, fitted.distances)
    card = replace(card, reference=reference, confidence=fitted.facts)
    (folder / CARD_FILE).write_text(card.to_json())
    return folder


def counted(folder: Path, images: Sequence[bytes]) -> Series:
    """The series of drift that a worker makes of images."""
    found: Series = {}

    def emit(name: str, value: float, labels: Sequence[str]) -> None:
        if name.startswith("classifier_drift_"):
            keys = ("model", "version", "signal", "bin")
            pairs = ", ".join(f'{key}="{label}"' for key, label in zip(keys, labels, strict=False))
            series = f'{name}{{job="classifier", {pairs}}}'
            found[series] = found.get(series, 0) + value if "total" in name else value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("handler.image_classifier.torchserve_emit", lambda: emit)
        patch.setattr("handler.accounting.SAMPLE_SECONDS", 0)
        classifier = start(folder)
        classifier.engine = Fake()
        for image in images:
            ask(classifier, {"body": image})
    assert isinstance(classifier.metrics, Metrics)
    classifier.metrics.flush()
    return found


@pytest.mark.parametrize(
    ("stream", "firing"),
    [
        (draw(1, 200), []),
        (random.Random(2).sample(draw(0, 200), 200), []),  # the calibration, reshuffled
        (draw(1, 5, light=0.3), []),  # too few to tell
        (draw(1, 200, light=0.3), ["brightness", "confidence", "distance"]),
        (draw(1, 200, largest=1000), ["size"]),
        (draw(1, 200, grain=0.1), ["distance"]),
    ],
    ids=["others of the kind", "reshuffled", "few", "dark", "large", "grain"],
)
def test_shifted_images_raise_the_alert(
    promtool: str,
    folder: Path,
    tmp_path: Path,
    isolation: list[object],  # noqa: F811
    stream: list[bytes],
    firing: list[str],
) -> None:
    series = [
        {"series": name, "values": f"0x20 {value}x200" if "total" in name else f"{value}x220"}
        for name, value in counted(folder, stream).items()
    ]
    alerts = 'count by (signal) (ALERTS{alertname="ClassifierDrift", alertstate="firing"})'
    case = {
        "interval": "30s",
        "input_series": series,
        "promql_expr_test": [
            {
                "expr": alerts,
                "eval_time": "55m",
                "exp_samples": [
                    {"labels": f'{{signal="{signal}"}}', "value": 1} for signal in firing
                ],
            }
        ],
    }
    rules = [str(MONITORING / name) for name in ("rules.yml", "alerts.yml")]
    content = {"rule_files": rules, "evaluation_interval": "1m", "tests": [case]}
    (tmp_path / "drift.yml").write_text(yaml.safe_dump(content))
    command = [promtool, "test", "rules", str(tmp_path / "drift.yml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
