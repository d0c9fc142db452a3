"""The results as one HTML file with thumbnails, which needs no network to be read."""

import heapq
from base64 import b64encode
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

from service.bulk.results import Key, Record
from service.bulk.sources import Image, is_archive, read
from service.bulk.summary import Summary

TEMPLATE = Path(__file__).with_name("report.html.jinja")
MOST_IMAGES = 1000
MOST_FAILED = 200
SIDE = 128  # pixels of a thumbnail's longer side
MAX_PIXELS = 100_000_000  # of an image that is decoded for one
# Not GIF: Pillow prepares a second frame of the size that the first claims, up to 4 GB.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")


def write_report(
    records: Iterable[Record], paths: Iterable[Path], summary: Summary, path: Path
) -> None:
    """The images with the lowest confidence, least first, and those that failed.

    At most MOST_IMAGES and MOST_FAILED of them. The images are read again for their thumbnails.
    Raises OSError.
    """
    failed: list[Record] = []
    shown = heapq.nsmallest(MOST_IMAGES, _classified(records, failed), key=_confidence)
    text = render(
        TEMPLATE,
        shown=shown,
        failed=failed,
        summary=summary,
        thumbnails=_thumbnails({_key(record) for record in shown}, paths),
    )
    path.write_text(text, "utf-8", errors="backslashreplace")


def render(template: Path, **content: Any) -> str:
    """The text of a page; what is put into it is escaped, since names may be anybody's."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # only a report needs it

    environment = Environment(
        loader=FileSystemLoader(template.parent),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(content)


def _classified(records: Iterable[Record], failed: list[Record]) -> Iterable[Record]:
    """Those with classes; the first of the others are added to `failed`."""
    for record in records:
        if record["status"] == "success":
            yield record
        elif len(failed) < MOST_FAILED:
            failed.append(record)


def _confidence(record: Record) -> float:
    return float(record["predictions"][0]["confidence"])


def _key(record: Record) -> Key:
    return record["image"], record["sha256"]


def _thumbnails(wanted: set[Key], paths: Iterable[Path]) -> dict[Key, str]:
    """JPEGs as base64 text, of those images that are as they were and can be opened here."""
    names = {name for name, _ in wanted}
    found: dict[Key, str] = {}
    needed = (path for path in paths if is_archive(path) or Image(str(path)).label in names)
    for image in read(needed):
        if image.label in names and (key := (image.label, image.sha256)) in wanted:
            thumbnail = draw_thumbnail(image.body)
            if thumbnail is not None:
                found[key] = b64encode(thumbnail).decode()
    return found


def draw_thumbnail(body: bytes) -> bytes | None:
    """A small JPEG of an image; None if it cannot be opened here, or is too large."""
    from PIL import Image as Pillow
    from PIL import ImageOps

    try:
        with Pillow.open(BytesIO(body), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                return None
            image.draft("RGB", (SIDE, SIDE))  # a JPEG is scaled down while it is decoded
            image.thumbnail((SIDE, SIDE))
            if image.format == "JPEG":  # the EXIF of others has no bound
                ImageOps.exif_transpose(image, in_place=True)
            small = image.convert("RGB")
        file = BytesIO()
        small.save(file, "JPEG", quality=80)
    except (OSError, SyntaxError, ValueError, Pillow.DecompressionBombError):
        return None
    return file.getvalue()
