"""Results as a table: CSV for spreadsheets, Parquet for programs; made from the JSON Lines."""

import csv
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from handler.errors import SetupError
from service.bulk.results import Record

COLUMNS = (
    "image", "bytes", "sha256", "status", "class", "class_id", "confidence", "error", "message",
    "model", "version", "weights", "width", "height", "predictions",
)  # fmt: skip
ROWS_AT_ONCE = 10_000
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet computes what begins so


def row(record: Record) -> dict[str, Any]:
    """The values of COLUMNS: `class`, `class_id` and `confidence` are those of the first class."""
    metadata = record.get("metadata") or {}
    predictions = record.get("predictions") or []
    best = predictions[0] if predictions else {}
    width, height = metadata.get("image_size") or (None, None)
    known = {**record, **metadata, **best, "predictions": predictions, "error": record.get("type")}
    return {name: known.get(name) for name in COLUMNS} | {"width": width, "height": height}


def write_csv(records: Iterable[Record], path: Path) -> None:
    """Texts that a spreadsheet would compute get an apostrophe before them. Raises OSError."""
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for values in map(row, records):
            values["predictions"] = json.dumps(values["predictions"], ensure_ascii=False)
            writer.writerow(map(_harmless, values.values()))


def _harmless(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def check_parquet() -> None:
    """Raises SetupError if the package for it is missing."""
    try:
        import pyarrow.parquet  # noqa: F401 - nothing else needs it
    except ImportError as exc:
        raise SetupError(
            "Parquet needs the packages of requirements-bulk.txt; pyarrow is missing"
        ) from exc


def write_parquet(records: Iterable[Record], path: Path) -> None:
    """`predictions` is a list of structures. Raises OSError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    prediction = pa.struct(
        [("class", pa.string()), ("class_id", pa.int32()), ("confidence", pa.float64())]
    )
    kinds = {"bytes": pa.int64(), "class_id": pa.int32(), "confidence": pa.float64()}
    kinds |= {"width": pa.int32(), "height": pa.int32(), "predictions": pa.list_(prediction)}
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in COLUMNS])
    with pq.ParquetWriter(path, schema) as writer:
        for rows in _groups(map(row, records)):
            clean = [_encodable(values) for values in rows]
            writer.write_table(pa.Table.from_pylist(clean, schema))


def _groups(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    while group := list(islice(rows, ROWS_AT_ONCE)):
        yield group


def _encodable(value: Any) -> Any:
    """The same with texts that UTF-8 can hold: JSON may have halves of a character."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {name: _encodable(part) for name, part in value.items()}
    return [_encodable(part) for part in value] if isinstance(value, list) else value
