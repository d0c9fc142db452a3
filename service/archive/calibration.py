"""The folders of --calibration and --calibrate: images, and labels if there is a labels.csv."""

import csv
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from handler.errors import InvalidModel, RequestError
from handler.images import Picture, read_picture
from handler.model_card import InputTransform
from handler.settings import Settings
from service.archive.progress import stage

LABELS_FILE = "labels.csv"
MAXIMUM_IMAGES = 2000  # 300 MB as the model sees them; a larger folder is sampled evenly


@dataclass(frozen=True)
class CalibrationSet:
    """Images as the model sees them, in the order of their file names."""

    images: tuple[NDArray[np.uint8], ...]  # RGB [3, H, W]
    labels: tuple[int, ...] | None  # class indices; None without labels.csv
    sizes: tuple[tuple[int, int], ...]  # width and height of the files


def read_calibration(
    folder: Path, transform: InputTransform, settings: Settings, option: str = "--calibration"
) -> CalibrationSet:
    """The images of a folder, decoded exactly, and the labels beside them.

    Exactly, because an archive outlives the setting `decode`. The folder holds images and,
    optionally, labels.csv with the columns file and class_id; hidden files are skipped.
    Raises InvalidModel, with the file's name, for anything else.
    """
    if not folder.is_dir():
        raise InvalidModel(f"{option} {folder}: there is no such folder")
    paths = sorted(
        path
        for path in folder.iterdir()
        if path.name != LABELS_FILE and not path.name.startswith(".")
    )
    labels = _read_labels(folder / LABELS_FILE, {path.name for path in paths})
    if len(paths) > MAXIMUM_IMAGES:
        chosen = np.linspace(0, len(paths) - 1, MAXIMUM_IMAGES).round().astype(int)
        paths = [paths[index] for index in chosen]
    exactly = replace(settings, decode="exact")
    pictures = []
    with stage("Reading images", len(paths), "image") as done:
        for path in paths:
            pictures.append(_read_image(path, transform, exactly, option))
            done()
    return CalibrationSet(
        tuple(np.ascontiguousarray(picture.pixels, np.uint8) for picture in pictures),
        None if labels is None else tuple(labels[path.name] for path in paths),
        tuple(picture.size for picture in pictures),
    )


def _read_image(path: Path, transform: InputTransform, settings: Settings, option: str) -> Picture:
    try:
        return read_picture(path.read_bytes(), transform, settings)
    except (OSError, RequestError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise InvalidModel(f"{option}: {path} is no image to calibrate with: {reason}") from exc


def _read_labels(path: Path, images: set[str]) -> dict[str, int] | None:
    """Class index by file name, one for every image; None if there is no such file."""
    if not path.exists():
        return None
    labels: dict[str, int] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            if missing := {"file", "class_id"} - set(reader.fieldnames or ()):
                raise InvalidModel(
                    f"{path} has no column {' and no column '.join(sorted(missing))}"
                )
            for row in reader:
                name, number = row["file"], row["class_id"] or ""
                where = f"{path} line {reader.line_num}"
                if name not in images:
                    raise InvalidModel(f"{where}: there is no image {name!r} beside it")
                if name in labels:
                    raise InvalidModel(f"{where}: {name} has a label already")
                if not number.isascii() or not number.isdigit():
                    raise InvalidModel(f"{where}: class_id must be a class index, got {number!r}")
                labels[name] = int(number)
    except (OSError, UnicodeDecodeError, csv.Error) as exc:
        raise InvalidModel(f"{path} cannot be read as CSV") from exc
    if unlabelled := sorted(images - set(labels)):
        raise InvalidModel(f"{path} has no label for {unlabelled[0]} ({len(unlabelled)} without)")
    return labels
