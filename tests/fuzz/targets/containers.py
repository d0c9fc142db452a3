"""What surrounds an image's pixels: never an error, and never longer without its decoration."""

from handler.containers import (
    count_scans,
    jpeg_precision,
    lacks_only_its_end,
    without_decoration,
)
from handler.images import foreign_format
from tests.fuzz.target import Target
from tests.fuzz.targets import images


def check(data: bytes) -> None:
    plain = without_decoration(data)
    assert len(plain) <= len(data) or data[:4] == b"RIFF"
    assert jpeg_precision(data) in (None, *range(256))
    assert 0 <= count_scans(data) <= len(data)
    assert lacks_only_its_end(data) in (True, False)
    name = foreign_format(data)
    assert name is None or len(name) < 20


TARGET = Target(
    check=check, seeds=images.seeds, tokens=images.TOKENS, repair=images.repaired, max_bytes=8192
)
