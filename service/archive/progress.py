"""How far a long stage of packaging has come, on stderr."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from service.tables import counted


@contextmanager
def stage(what: str, total: int, unit: str) -> Iterator[Callable[[], object]]:
    """Show a stage of `total` units as a bar, or as one line if stderr is no terminal.

    The function that it gives is to be called after each unit.
    """
    if not sys.stderr.isatty():
        print(f"{what}: {counted(total, unit)}", file=sys.stderr, flush=True)
    with tqdm(desc=what, total=total, unit=unit, disable=None) as bar:
        yield bar.update
