"""Class names from the kinds of files that people keep them in, ordered by class index.

The suffixes of JSON, YAML and CSV decide how a file is read, else its content. If it is not certain
what is meant, the file is refused: the number of names may be right, and hide the mistake.
"""

import csv
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from handler.errors import InvalidModel

# The key of the names in transformers' config.json, in data.yaml, in files of trainers.
KEYS = ("class_to_idx", "id2label", "names", "labels", "classes")
NAME_COLUMNS = ("name", "label", "class", "class_name", "category", "labels", "names", "classes")
INDEX_COLUMNS = ("class_id", "class_idx", "class_index", "index", "idx", "id", "label_id")
INDEX_FIRST = re.compile(r"(?P<index>[0-9]{1,9})(?:\s*[:,;=|)]\s*|\.?\s+)(?P<name>\S.*)")
INDEX_LAST = re.compile(r"(?P<name>\S.*?)(?:\s*[:=]\s*|\s+)(?P<index>[0-9]{1,9})")
QUOTED = re.compile(r"""(["'])(.+)\1,?""")
CODE = re.compile(r"n[0-9]{8}")  # ImageNet's folders
CODE_FIRST = re.compile(rf"{CODE.pattern}[\s:,;]+(\S.*)")  # its synset_words.txt
FORMS = "a list of names, index to name, or name to index"


class _Unclear(ValueError):
    """The message says what is wrong with the content."""


class _Malformed(_Unclear):
    """The content is not in the format it was read as."""


def read_labels(path: Path) -> list[str]:
    """Class names in the order of their indices.

    From text, one a line, numbered or not; CSV; JSON or YAML: a list, index to name or name to
    index, with `[id, name]` for a name as TorchServe's index_to_name.json has it. Raises
    InvalidModel.
    """
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as exc:
        raise InvalidModel(f"--labels {path} cannot be read as text in UTF-8") from exc
    try:
        labels = _parse(text, path.suffix.lower())
        for index, label in enumerate(labels):
            _check(index, label)
    except _Unclear as exc:
        raise InvalidModel(f"--labels {path}: {exc}") from exc
    except RecursionError as exc:
        raise InvalidModel(f"--labels {path}: nested too deep; expected {FORMS}") from exc
    if not labels:
        raise InvalidModel(f"--labels {path} is empty")
    return labels


def check_labels(labels: Sequence[str], classes: int, own: bool) -> None:
    """Raise InvalidModel, with both numbers, if labels and classes differ."""
    if len(labels) != classes:
        whose = "--labels has" if own else "no --labels given, and the recipe has"
        raise InvalidModel(f"{whose} {len(labels)} names, the weights have {classes} classes")


def _check(index: int, label: Any) -> None:
    if not isinstance(label, str):
        raise _Unclear(f"class {index} must have a name, got {str(label)[:60]}")
    if not label.strip():
        raise _Unclear(f"class {index} has no name")
    try:
        label.encode()
    except UnicodeEncodeError as exc:
        raise _Unclear(
            f"the name of class {index}, {label[:60]!a}, holds half of a surrogate pair, which is "
            "no text"
        ) from exc


def _parse(text: str, suffix: str) -> list[Any]:
    """The entries of a file, by index, not yet checked."""
    if suffix == ".json":
        return _names(_load_json(text))
    if suffix in (".yaml", ".yml"):
        return _names(_load_yaml(text))
    lines = [line.strip() for line in text.rstrip().splitlines()]
    if suffix in (".csv", ".tsv"):
        delimiter = max(",;\t", key=lines[0].count) if lines else ","
        return _read_table(_rows(lines, delimiter))
    if not lines:
        return []
    if lines[0].startswith(("[", "{")):  # JSON, or Python, under another name
        for load in (_load_json, _load_yaml):
            try:
                content = load(text)
            except _Malformed:
                continue
            return _names(content)
        if re.match(r"""[\[{]\s*(["'0-9]|$)""", lines[0]):
            raise _Unclear("begins as JSON does, and is not valid JSON")
    items = lines[1:] if re.fullmatch(rf"---|(?:{'|'.join(KEYS)}):", lines[0]) else lines
    if items and all(re.match(r"-(\s|$)", line) for line in items):
        return _names(_load_yaml(text))
    for delimiter in ",;\t":
        if all(delimiter in line for line in lines):
            rows = _rows(lines, delimiter)
            if _index_columns(rows) or _index_columns(rows[1:]):
                return _read_table(rows)
    return _read_lines(lines)


def _read_lines(lines: Sequence[str]) -> list[str]:
    """Names one a line, with or without their indices or ImageNet's codes."""
    for pattern in (INDEX_FIRST, INDEX_LAST):
        matches = [match for line in lines if (match := pattern.fullmatch(line))]
        if len(matches) < len(lines):
            continue
        numbers = [int(match["index"]) for match in matches]
        # "class 0", "class 1", … are names.
        if _are_indices(numbers) and len({match["name"] for match in matches}) > 1:
            return _in_order((int(match["index"]), match["name"]) for match in matches)
        if pattern is INDEX_FIRST and 0 in numbers:
            raise _Unclear(f"every line begins with a number, and {_not_indices(numbers)}")
        if pattern is INDEX_FIRST and sorted(numbers) == [*range(1, len(lines) + 1)]:
            raise _Unclear(
                "the lines are numbered from 1, and class indices begin at 0: number them from 0, "
                "or leave the numbers out (names that begin with numbers: as a JSON list)"
            )
    if all(CODE_FIRST.fullmatch(line) for line in lines):
        return [CODE_FIRST.sub(r"\1", line) for line in lines]
    if all(QUOTED.fullmatch(line) for line in lines):  # no name has quotes around it
        return [QUOTED.sub(r"\2", line) for line in lines]
    return list(lines)


def _rows(lines: Sequence[str], delimiter: str) -> list[list[str]]:
    try:
        reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
        return [[cell.strip() for cell in row] for row in reader]
    except csv.Error as exc:
        raise _Unclear(f"not valid CSV: {exc}") from exc


def _read_table(rows: list[list[str]]) -> list[str]:
    """Names of a table: by a column of indices, or row by row if names are the only column."""
    for number, row in enumerate(rows, 1):
        if len(row) != len(rows[0]):
            raise _Unclear(
                f"row {number} has {len(row)} columns, row 1 has {len(rows[0])}; "
                "a name with the delimiter in it goes in double quotes"
            )
    columns = range(len(rows[0])) if rows else ()
    if len(columns) < 2:
        cells = [row[0] for row in rows]
        return _read_lines(cells[1:] if cells and cells[0].lower() in NAME_COLUMNS else cells)
    has_header = not _index_columns(rows) and (
        any(cell.lower() in (*NAME_COLUMNS, *INDEX_COLUMNS) for cell in rows[0])
        or bool(_index_columns(rows[1:]))
    )
    header = [cell.lower() if has_header else "" for cell in rows[0]]
    body = rows[1:] if has_header else rows
    coded = [column for column in columns if all(CODE.fullmatch(row[column]) for row in body)]
    indices = _index_columns(body)
    if len(indices) > 1:
        indices = [column for column in indices if header[column] in INDEX_COLUMNS]
    names = [column for column in columns if column not in (*indices, *coded)]
    if len(names) > 1:
        names = [column for column in names if header[column] in NAME_COLUMNS]
    found = ", ".join(rows[0])
    if len(names) != 1:
        raise _Unclear(f"which column holds the names is not certain, in row 1: {found}")
    if len(indices) == 1:
        return _in_order((int(row[indices[0]]), row[names[0]]) for row in body)
    if coded and len(columns) == 2:
        return [row[names[0]] for row in body]
    raise _Unclear(
        f"no one column holds the class indices 0 to {len(body) - 1}, each once, in row 1: {found}"
    )


def _names(content: Any) -> list[Any]:
    """The entries of parsed JSON or YAML, by index."""
    if isinstance(content, dict):
        inside = (content[key] for key in KEYS if isinstance(content.get(key), dict | list))
        content = next(inside, content)
    if isinstance(content, list):
        return [_name(entry) for entry in content]
    if not isinstance(content, dict):
        raise _Unclear(f"must hold {FORMS}, got {str(content)[:60]!r}")
    keys, values = [_number(key) for key in content], [_number(each) for each in content.values()]
    if _are_indices(values) and content:
        if _are_indices(keys) and keys != values and isinstance(next(iter(content.values())), str):
            raise _Unclear("both keys and values are class indices, and which are names is unclear")
        return _in_order(zip(values, content, strict=True))
    if _are_indices(keys):
        return _in_order(zip(keys, map(_name, content.values()), strict=True))
    if None not in values:
        raise _Unclear(f"the values must be class indices, and {_not_indices(values)}")
    if None not in keys:
        raise _Unclear(f"the keys must be class indices, and {_not_indices(keys)}")
    found = ", ".join(map(repr, [*content][:3]))
    raise _Unclear(
        f"neither the keys nor the values are the class indices 0 to {len(content) - 1}; "
        f"the first keys are {found}"
    )


def _name(entry: Any) -> Any:
    """`["n01440764", "tench"]` is "tench"."""
    return entry[-1] if isinstance(entry, list) and len(entry) == 2 else entry


def _number(entry: Any) -> int | None:
    """A class index, written as a number or as text; None for anything else."""
    if isinstance(entry, str) and re.fullmatch("0|[1-9][0-9]{0,8}", entry):
        return int(entry)
    return entry if type(entry) is int else None


def _are_indices(numbers: Sequence[int | None]) -> bool:
    """Whether they are 0 to n - 1, each once, in any order."""
    return None not in numbers and {*numbers} == {*range(len(numbers))}


def _not_indices(numbers: Sequence[int | None]) -> str:
    """Why numbers are not 0 to n - 1, each once."""
    expected = f"they must be 0 to {len(numbers) - 1}, each once: "
    missing = min({*range(len(numbers))} - {*numbers}, default=0)
    twice = [number for number in numbers if numbers.count(number) > 1]
    return expected + (f"{twice[0]} is there twice" if twice else f"{missing} is missing")


def _index_columns(rows: Sequence[Sequence[str]]) -> list[int]:
    return [
        column
        for column in range(min(map(len, rows), default=0))
        if _are_indices([_number(row[column]) for row in rows])
    ]


def _in_order(named: Iterable[tuple[int | None, Any]]) -> list[Any]:
    by_index = dict(named)
    return [by_index[index] for index in range(len(by_index))]


def _load_json(text: str) -> Any:
    """Raises _Malformed for what is not JSON, _Unclear for a duplicate key."""
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except _Unclear:
        raise
    except ValueError as exc:
        raise _Malformed(f"is not valid JSON: {exc}") from exc


def _load_yaml(text: str) -> Any:
    """YAML with every scalar as it is written: `no` is a name, not false.

    Raises _Malformed for what is not YAML, _Unclear for a duplicate key.
    """
    try:
        return _plain(yaml.compose(text, Loader=yaml.BaseLoader))
    except yaml.YAMLError as exc:
        raise _Malformed(f"is not valid YAML: {' '.join(str(exc).split())}") from exc


def _plain(node: yaml.Node | None) -> Any:
    if isinstance(node, yaml.MappingNode):
        return _without_duplicates((str(_plain(key)), _plain(each)) for key, each in node.value)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(each) for each in node.value]
    return node.value if node else None


def _without_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            first, second = (str(each)[:60] for each in (content[key], value))
            raise _Unclear(f"the key {key!r} is there twice, for {first!r} and for {second!r}")
        content[key] = value
    return content
