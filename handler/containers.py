"""What surrounds an image's pixels: the chunks of a PNG or WebP file, the segments of a JPEG.

Browsers show an image whatever its decoration holds: texts, profiles and previews. Pillow reads
some of it first, and refuses the whole image if a text is long, a profile odd or a checksum wrong.
"""

import re
import struct
import zlib
from collections.abc import Iterable, Iterator

import numpy as np

Span = tuple[int, int]  # start and end of what is left out

PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8\xff"
JPEG_END = b"\xff\xd9"

_TRNS_LENGTHS = {0: (2,), 2: (6,), 3: range(1, 257)}  # by a PNG's colours: grey, RGB, palette

_START_OF_SCAN = 0xDA
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # a JPEG's SOF0 to SOF15

# A JPEG's marker, whose first byte may be repeated, and its segment's length, which counts itself.
_SEGMENT = re.compile(rb"\xff+([\x02-\xfe])(..)", re.DOTALL)
_SCAN = re.compile(rb"\xff\xda\0[\x08\x0a\x0c\x0e]([\1-\4])", re.DOTALL)

# What application segments say about pixels: their colours, and which side is up. Colours in fewer
# bytes than these are none for libjpeg either.
_NEEDED = re.compile(rb"JFIF\0.{9}|Adobe.{7}|Exif\0\0|http://ns\.adobe\.com/xap/1\.0/\0", re.DOTALL)

_WEBP_CHUNKS = {b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF", b"EXIF"}


def without_decoration(data: bytes) -> bytes:
    """A PNG, JPEG or WebP file reduced to what its pixels need; anything else as it is.

    Pixels that are cut short or damaged stay so.
    """
    if data.startswith(PNG):
        return _without(data, _png_decoration(data))
    if data.startswith(JPEG):
        return _without(data, _jpeg_decoration(data))
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        chunks = _without(data, _webp_decoration(data))[12:]
        return struct.pack("<4sI4s", b"RIFF", 4 + len(chunks), b"WEBP") + chunks
    return data


def jpeg_precision(data: bytes) -> int | None:
    """Bits of a sample by a JPEG's frame header: 8 in all that browsers show. None without one."""
    for marker, _, body, _ in _segments(data):
        if marker in _FRAMES:
            return data[body] if body < len(data) else None
    return None


def count_scans(data: bytes) -> int:
    """Scans of a JPEG, or more: those of its previews, and what looks like a scan, count as well.

    A scan's header has 14 bytes at most, so the first byte of its length is 0. numpy counts in a
    quarter of the time of bytes.count.
    """
    levels = np.frombuffer(data, np.uint8)
    scans = (levels[:-2] == 0xFF) & (levels[1:-1] == _START_OF_SCAN) & (levels[2:] == 0)
    return int(np.count_nonzero(scans))


def lacks_only_its_end(data: bytes) -> bool:
    """Whether a JPEG has no end marker, and scans for every bit of every coefficient.

    A decoder notices if the last scan is cut short, but not if the file is cut between two scans.
    """
    segments = list(_segments(data))
    components = {
        component
        for marker, _, body, end in segments
        if marker in _FRAMES
        for component in data[body + 6 : end : 3]
    }
    first_scan = segments[-1][1] if segments else 0
    if not components or data.find(JPEG_END, first_scan) >= 0:
        return False
    missing = {(component, place) for component in components for place in range(64)}
    for scan in _SCAN.finditer(data, first_scan):
        names = 2 * scan[1][0]
        parameters = data[scan.end() : scan.end() + names + 3]
        if len(parameters) == names + 3 and parameters[-1] & 15 == 0:
            places = range(parameters[-3], parameters[-2] + 1)
            missing -= {(name, place) for name in parameters[:names:2] for place in places}
    return not missing


def _without(data: bytes, spans: Iterable[Span]) -> bytes:
    """The bytes between the spans, which come in order."""
    kept = bytearray()
    done = 0
    for start, end in spans:
        kept += data[done:start]
        done = end
    return bytes(kept + data[done:])


def _png_decoration(data: bytes) -> Iterator[Span]:
    """All but the critical chunks, and one tRNS and one eXIf that a browser would take."""
    optional = {b"tRNS", b"eXIf"}
    at = len(PNG)
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        start, at = at, at + 12 + length
        if kind == b"IDAT":
            optional.discard(b"tRNS")  # which has to come before
        elif kind == b"IEND":
            yield at, len(data)
            return
        elif kind[0] & 0x20:  # lower case: ancillary
            if kind in optional and _is_sound(data, start, at):
                optional.remove(kind)
            else:
                yield start, at


def _is_sound(data: bytes, start: int, end: int) -> bool:
    """Whether a PNG's chunk has its checksum, and a tRNS the length for the image's colours."""
    length, colour_type = end - start - 12, int.from_bytes(data[25:26], "big")
    if data[start + 4 : start + 8] == b"tRNS" and length not in _TRNS_LENGTHS.get(colour_type, ()):
        return False
    checksum = int.from_bytes(data[end - 4 : end], "big")
    return end <= len(data) and zlib.crc32(memoryview(data)[start + 4 : end - 4]) == checksum


def _segments(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Marker, start, start of the body and end of a JPEG's segments, to the first scan's header."""
    at, marker = 2, 0
    while marker != _START_OF_SCAN and (segment := _SEGMENT.match(data, at)):
        marker, start, body = segment[1][0], at, segment.end()
        at = segment.start(2) + int.from_bytes(segment[2], "big")
        yield marker, start, body, at


def _jpeg_decoration(data: bytes) -> Iterator[Span]:
    """Comments, and application segments that say nothing of pixels."""
    for marker, start, body, end in _segments(data):
        if marker == 0xFE or (0xE0 <= marker <= 0xEF and not _NEEDED.match(data, body, end)):
            yield start, end


def _webp_decoration(data: bytes) -> Iterator[Span]:
    """All but the chunks of pixels, and an EXIF block if it is there to its end."""
    at = 12
    while at + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, at)
        start, at = at, at + 8 + length + length % 2
        if kind not in _WEBP_CHUNKS or (kind == b"EXIF" and at > len(data)):
            yield start, at
    yield at, len(data)
