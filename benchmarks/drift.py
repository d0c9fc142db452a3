"""Which shifts of real images raise the alert of drift, and how often images without one do.

    python -m benchmarks.drift ARCHIVE IMAGES [--seeds N]

For each seed, half of the images are the calibration and the other half is what comes in an hour,
as it is and shifted. A cell is the share of seeds in which a signal raises ClassifierDrift. The
index and its limit are those of deploy/monitoring/rules.yml.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from handler.confidence import describe_answer, describe_pixels
from handler.drift import Bins
from handler.engines import load_engine
from handler.errors import InvalidModel
from handler.images import read_picture
from handler.settings import Settings
from service.archive.calibration import CalibrationSet
from service.archive.confidence import distances, fit_gaussian, held_out_distances
from service.archive.mar import read_card, unpack
from service.archive.reference import PRIOR, make_bins, signals_of
from service.tables import text_table

LIMIT = 0.25


def grainy(pixels: NDArray[np.uint8], sigma: float) -> NDArray[np.uint8]:
    noise = np.random.default_rng(0).normal(0, sigma, pixels.shape)
    return np.clip(pixels + noise, 0, 255).astype(np.uint8)


SHIFTS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "none": lambda image: image,
    "dark (levels x 0.4)": lambda image: ImageEnhance.Brightness(image).enhance(0.4),
    "bright (levels x 1.8)": lambda image: ImageEnhance.Brightness(image).enhance(1.8),
    "blurred (radius 4)": lambda image: image.filter(ImageFilter.GaussianBlur(4)),
    "inverted": ImageOps.invert,
    "grainy (sigma 12)": lambda image: Image.fromarray(grainy(np.asarray(image), 12)),
    "half the size": lambda image: image.resize((image.width // 2, image.height // 2)),
}
ONE_KIND = "classes below 398 alone"  # ImageNet's animals


def stability_index(bins: Bins, values: list[float]) -> float:
    """The population stability index of values against the shares of bins."""
    counts = np.bincount([bins.index(value) for value in values], minlength=len(bins.shares))
    shares = (counts + PRIOR) / (len(values) + PRIOR * len(counts))
    expected = np.array(bins.shares)
    return float(((shares - expected) * np.log(shares / expected)).sum())


def chance(bins: Bins, images: int, calibration: int) -> float:
    """What chance alone makes of the index, at most: mean and three standard deviations."""
    freedom = len(bins.shares) - 1
    return float((freedom + 3 * np.sqrt(2 * freedom)) * (1 / images + 1 / calibration))


@dataclass(frozen=True)
class Seen:
    """The images of a shift, N of them."""

    signals: dict[str, NDArray[Any]]  # [N] each, but for the distance, which is that from others
    described: NDArray[np.float32]  # [N, D], what the distance is taken of


def read_images(archive: Path, images: list[Path]) -> dict[str, Seen]:
    """By shift, what a worker makes of the images."""
    card = read_card(archive)
    if card is None:
        raise InvalidModel(f"{archive} is no archive of this release")
    found = {}
    with TemporaryDirectory() as folder:
        unpacked = unpack(archive, None, Path(folder) / "archive")
        engine = load_engine(card, unpacked, Settings(), None, workers=1)
        for name, shift in SHIFTS.items():
            pictures = []
            for path in images:
                file = BytesIO()
                shift(Image.open(path).convert("RGB")).save(file, "JPEG", quality=95)
                pictures.append(read_picture(file.getvalue(), card.transform, Settings()))
            pixels = [picture.pixels for picture in pictures]
            probabilities = np.concatenate([engine.launch([each])() for each in pixels])
            seen = CalibrationSet(
                tuple(each.numpy() for each in pixels),
                None,
                tuple(picture.size for picture in pictures),
            )
            described = [
                np.concatenate([describe_pixels(image), describe_answer(row)])
                for image, row in zip(seen.images, probabilities, strict=True)
            ]
            signals = signals_of(seen, probabilities, np.zeros(len(described), np.float32))
            found[name] = Seen(
                {signal: np.array(values) for signal, values in signals.items()},
                np.stack(described),
            )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drift", description=__doc__)
    parser.add_argument("archive", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--seeds", type=int, default=100)
    args = parser.parse_args()
    images = sorted(path for path in args.images.iterdir() if path.suffix in (".jpg", ".png"))
    found = read_images(args.archive, images)
    usual = found["none"]
    kept = usual.signals["class"] < 398
    alarms: dict[str, dict[str, int]] = {}
    for seed in range(args.seeds):
        order = np.random.default_rng(seed).permutation(len(images))
        first, second = order[: len(order) // 2], order[len(order) // 2 :]
        streams = {name: (seen, second) for name, seen in found.items()}
        streams[ONE_KIND] = usual, second[kept[second]]
        known = {signal: values[first] for signal, values in usual.signals.items()}
        known["distance"] = held_out_distances(usual.described[first])
        gaussian = fit_gaussian(usual.described[first])
        for name, (seen, chosen) in streams.items():
            come = {signal: values[chosen] for signal, values in seen.signals.items()}
            come["distance"] = distances(seen.described[chosen], *gaussian)
            row = alarms.setdefault(name, dict.fromkeys(come, 0) | {"any": 0})
            raised = []
            for signal, values in come.items():
                bins = make_bins(known[signal].tolist())
                index = stability_index(bins, values.tolist())
                if index - chance(bins, len(chosen), len(first)) > LIMIT:
                    raised.append(signal)
            for signal in raised + ["any"] * bool(raised):
                row[signal] += 1
    headings = ["shift", *next(iter(alarms.values()))]
    rows = [
        [name, *(f"{100 * count / args.seeds:.0f} %" for count in row.values())]
        for name, row in alarms.items()
    ]
    print("\n".join(text_table(headings, rows)))
    print(json.dumps({"images": len(images), "seeds": args.seeds, "alarms": alarms}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
