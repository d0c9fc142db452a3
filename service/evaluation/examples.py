"""Labelled images: a folder for each class, CSV or JSON Lines, and the classes that are meant."""

import csv
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from handler.errors import SetupError
from service.bulk.sources import SUFFIXES, expand

LABELS_FILE = "labels.csv"  # of a folder, as --calibration takes it
MOST = 1_000_000  # images
MAX_LINE = 65_536  # bytes of a line of JSON
NAMED = 5  # labels that a message names


@dataclass(frozen=True)
class Example:
    """An image and the class that it shows: an index, or what should be a name or an index."""

    path: Path
    label: str | int


def read_examples(given: Path) -> list[Example]:
    """The labelled images that a folder, a .csv or a .jsonl names, each once.

    Paths in a file are relative to its folder. Raises SetupError, with the line that is wrong;
    OSError.
    """
    if given.is_dir():
        listed = given / LABELS_FILE
        found = _csv(listed) if listed.exists() else _tree(given)
    elif given.suffix.lower() == ".csv":
        found = _csv(given)
    elif given.suffix.lower() in (".jsonl", ".ndjson"):
        found = _json_lines(given)
    else:
        raise SetupError(f"{given} is no folder, .csv or .jsonl")
    examples: dict[Path, Example] = {}
    for example in found:
        if example.path in examples:
            raise SetupError(f"{given}: {example.path} has a label already")
        examples[example.path] = example
        if len(examples) > MOST:
            raise SetupError(f"{given} has more than {MOST} images")
    if not examples:
        raise SetupError(
            f"{given} has no labelled images: a folder needs {LABELS_FILE}, or a folder for each "
            f"class with images in it ({' '.join(SUFFIXES)})"
        )
    return list(examples.values())


def _tree(folder: Path) -> Iterator[Example]:
    """Each folder is named after its class."""
    for below in sorted(folder.iterdir()):
        if below.is_dir() and not below.name.startswith("."):
            for path in expand([below.absolute()], BytesIO()):
                yield Example(path, below.name)


def _csv(path: Path) -> Iterator[Example]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = set(reader.fieldnames or ())
            if "file" not in columns or not columns & {"class_id", "label"}:
                raise SetupError(f"{path} needs the columns file, and class_id or label")
            for row in reader:
                where = f"{path} line {reader.line_num}"
                number = row.get("class_id")
                if number and not (number.isascii() and number.isdigit() and len(number) < 10):
                    raise SetupError(
                        f"{where}: class_id must be a class index, got {number[:40]!r}"
                    )
                index = int(number) if number else None
                yield _example(path, where, row["file"], index, row.get("label"))
    except (UnicodeDecodeError, csv.Error) as exc:
        raise SetupError(f"{path} cannot be read as CSV: {exc}") from exc


def _json_lines(path: Path) -> Iterator[Example]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            where = f"{path} line {number}"
            if len(line) > MAX_LINE:
                raise SetupError(f"{where} has more than {MAX_LINE} bytes")
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as exc:
                raise SetupError(f"{where} is no JSON") from exc
            if not isinstance(row, dict):
                raise SetupError(f"{where} must be an object with file, and class_id or label")
            yield _example(path, where, row.get("file"), row.get("class_id"), row.get("label"))


def _example(path: Path, where: str, file: object, index: object, label: object) -> Example:
    """The index counts if a line has both: two classes may have one name."""
    if not isinstance(file, str) or not file or "\0" in file:
        raise SetupError(f"{where}: file must be the path of an image")
    if type(index) is int:
        meant: str | int = index
    elif index is None and isinstance(label, str) and label:
        meant = label
    else:
        raise SetupError(f"{where}: {file} needs class_id (a number) or label (a text)")
    return Example(path.parent.absolute() / file, meant)


def resolve(examples: Sequence[Example], labels: Sequence[str]) -> dict[Path, int]:
    """The class index of each image, by its path.

    A text is the name of a class, or else an index. Raises SetupError for a label that is neither,
    and for a name that several classes have.
    """
    named: dict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(labels):
        named[name].append(index)
    known: dict[str | int, int] = {}
    unknown: list[str] = []
    for label in dict.fromkeys(example.label for example in examples):
        indices = named.get(label, []) if isinstance(label, str) else []
        if len(indices) > 1:
            classes = " and ".join(map(str, indices))
            raise SetupError(f"the label {label!r} names the classes {classes}: give class_id")
        index = indices[0] if indices else _index(label)
        if 0 <= index < len(labels):
            known[label] = index
        else:
            unknown.append(repr(label)[:60])
    if unknown:
        more = f" and {len(unknown) - NAMED} more" if len(unknown) > NAMED else ""
        raise SetupError(
            f"no class of the model: {', '.join(unknown[:NAMED])}{more}; a label is one of its "
            f"{len(labels)} names, such as {labels[0]!r}, or an index from 0 to {len(labels) - 1}"
        )
    return {example.path: known[example.label] for example in examples}


def _index(label: str | int) -> int:
    """-1 for a text that is none."""
    if isinstance(label, int):
        return label
    return int(label) if label.isascii() and label.isdigit() and len(label) < 10 else -1
