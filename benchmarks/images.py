"""The images that subjects are measured with, and those with a label."""

import csv
from io import BytesIO
from pathlib import Path

from PIL import Image

from service.load.generator import Picture, load_pictures

LABELS_FILE = "labels.csv"


def load_rgb(folder: Path | None) -> list[Picture]:
    """The colour JPEGs of a folder, or drawn ones.

    Only colour, because TorchServe's own handler fails on grey images: every subject gets the same.
    """
    pictures = load_pictures(folder)
    return [p for p in pictures if Image.open(BytesIO(p.body)).mode == "RGB"]


def read_labels(folder: Path | None) -> dict[str, str]:
    """File name to class name from labels.csv: file, class_id, label. Empty where there is none."""
    if folder is None or not (folder / LABELS_FILE).exists():
        return {}
    with (folder / LABELS_FILE).open(encoding="utf-8", newline="") as file:
        return {row["file"]: row["label"] for row in csv.DictReader(file)}
