"""The images that subjects are measured with, and those with a label."""

import csv
from io import BytesIO
from pathlib import Path

from PIL import Image

from service.load.images import ImageRequest, load_images

LABELS_FILE = "labels.csv"


def load_rgb(folder: Path | None) -> list[ImageRequest]:
    """The colour JPEGs of a folder, or drawn ones.

    Grey ones are left out, because TorchServe's own handler fails on them: every subject gets the
    same images.
    """
    images = load_images(folder)
    return [image for image in images if Image.open(BytesIO(image.body)).mode == "RGB"]


def read_labels(folder: Path | None) -> dict[str, str]:
    """File name to class name, from the columns file and label of labels.csv, if there is one."""
    if folder is None or not (folder / LABELS_FILE).exists():
        return {}
    with (folder / LABELS_FILE).open(encoding="utf-8", newline="") as file:
        return {row["file"]: row["label"] for row in csv.DictReader(file)}
