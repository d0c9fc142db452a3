"""Many images into one output: a run that can be interrupted, and goes on where it ended."""

import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from handler.errors import SetupError
from service.bulk.formats import check_parquet, write_csv, write_parquet
from service.bulk.pace import Pace
from service.bulk.report import write_report
from service.bulk.results import Results
from service.bulk.run import Lost, classify
from service.bulk.sources import Image, is_archive, read
from service.bulk.summary import Summary
from service.client import Client

FORMATS = {"jsonl": None, "csv": write_csv, "parquet": write_parquet}


@dataclass(frozen=True)
class Output:
    """What is written; CSV and Parquet are made at the end, from JSON Lines beside them."""

    path: Path
    format: str  # one of FORMATS
    html: Path | None = None

    @classmethod
    def named(cls, path: Path, format: str | None, html: Path | None = None) -> "Output":
        """With the format that the suffix says, if none is given. Raises SetupError."""
        format = format or path.suffix.lower().removeprefix(".")
        if format not in FORMATS:
            raise SetupError(f"{path}: end its name with .{', .'.join(FORMATS)}, or say --format")
        if format == "parquet":
            check_parquet()
        output = cls(path, format, html)
        if path.exists() and not output.lines.exists():
            raise SetupError(f"{path} exists, and no {output.lines} that could be continued")
        return output

    @property
    def lines(self) -> Path:
        """The JSON Lines, which the next run continues."""
        return self.path if self.format == "jsonl" else Path(f"{self.path}.jsonl")


def label(
    paths: Sequence[Path], client: Client, output: Output, concurrency: int, patience: float
) -> Summary:
    """Ask about all images that the output does not have, and write it.

    Ctrl-C or SIGTERM ends the run after the requests that are under way, and a second one at once.
    Raises SetupError if the output is none of ours, or in use; OSError if it cannot be written.
    """
    summary = Summary()
    pace = Pace(concurrency, patience)
    begin = time.monotonic()
    total = None if any(map(is_archive, paths)) else len(paths)
    with (
        Results(output.lines) as results,
        _interruptible() as stop,
        tqdm(total=total, unit=" images", disable=None) as bar,
    ):

        def new() -> Iterator[Image]:
            for image in read(paths):
                if results.claim(image):
                    yield image
                else:
                    summary.skipped += 1
                    bar.update()

        def notice(text: str) -> None:
            bar.write(text, file=sys.stderr)

        try:
            for image, answer in classify(new(), client.ask, pace, stop, notice):
                results.add(image, answer)
                summary.new += 1
                bar.set_postfix_str(f"{pace.allowed} at once", refresh=False)
                bar.update()
        except Lost as exc:
            summary.stopped = str(exc)
        if stop.is_set():
            summary.stopped = "interrupted"
        summary.seconds = time.monotonic() - begin
        summary.count(results.records())
        _write(results, paths, summary, output)
    return summary


def _write(results: Results, paths: Sequence[Path], summary: Summary, output: Output) -> None:
    """All but the JSON Lines. Each file is there in whole, or as it was before."""
    if summary.stopped:
        return  # the next run writes them
    if write := FORMATS[output.format]:
        new = output.path.with_name(f"{output.path.name}.tmp")
        write(results.records(), new)
        new.replace(output.path)
    if output.html:
        new = output.html.with_name(f"{output.html.name}.tmp")
        write_report(results.records(), paths, summary, new)
        new.replace(output.html)


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Set by the first SIGINT or SIGTERM; the second does what it did before."""
    stop = threading.Event()
    names = (signal.SIGINT, signal.SIGTERM)
    before = {name: signal.getsignal(name) for name in names}

    def end(*_: object) -> None:
        stop.set()
        for name in names:
            signal.signal(name, signal.SIG_DFL)

    for name in names:
        signal.signal(name, end)
    try:
        yield stop
    finally:
        for name in names:
            signal.signal(name, before[name])
