"""multipart/form-data, as clients really send it, to named parts.

Behind the gateway a form arrives whole and is taken apart here: TorchServe's own parser answers
some valid forms with a 500, keeps their bytes in Java's memory, and loses the parts' file names.
"""

import base64
import binascii
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from multipart import MultipartError, MultipartSegment, PushMultipartParser

from handler.errors import InvalidBase64, MalformedRequest, TooManyImages

MAX_HEADER = 2048  # bytes of one header; a file name of 255 bytes takes up to 1,100
MAX_HEADERS = 8  # of one part
MIXED = "multipart/mixed"
BLANKS = b" \t\r\n\v\f"
REPEATED = "\n"  # between a name and its number if parts share the name; no header can hold it

_BOUNDARY = re.compile(r';\s*boundary\s*=\s*(?:"([^"]*)"|([^;]*))', re.IGNORECASE)
_EXTENDED_FILENAME = re.compile(
    r";\s*filename\*\s*=\s*(utf-8|iso-8859-1)'[^']*'([^;\s]+)", re.IGNORECASE
)


@dataclass(frozen=True)
class Part:
    """One named value of a request: an image or an option."""

    name: str
    value: Any  # bytes, or what TorchServe made of text and JSON, or what is wrong with the bytes
    filename: str | None = None


class _Parser(PushMultipartParser):
    """Leaves a part's disposition to us: those of a multipart/mixed are attachments."""

    def _create_segment(self, headerlist: list[tuple[str, str]]) -> MultipartSegment:
        return MultipartSegment(headerlist)


class _Allowance:
    """What the parts of one form, nested ones included, may still take.

    Headers are by far the slowest to read, folded ones above all.
    """

    def __init__(self, max_images: int) -> None:
        self.max_images = max_images
        self.parts = self.max_parts = max_images + 2  # top_k and filename
        self.header_bytes = 16384 + 256 * self.parts

    def spend(self, segment: MultipartSegment) -> None:
        self.parts -= 1
        if self.parts < 0:
            raise TooManyImages(
                f"the form has more than {self.max_parts} parts, "
                f"the limit is {self.max_images} images"
            )
        self.header_bytes -= sum(len(name) + len(value) for name, value in segment.headerlist)
        if self.header_bytes < 0:
            raise MalformedRequest(
                "the headers of the form's parts are too long; shorten the names"
            )


def read_boundary(content_type: str) -> str:
    """The boundary that a content type names, or "".

    Some clients send one such as ----=_Part_1 without the quotes that the standard asks for.
    """
    match = _BOUNDARY.search(content_type)
    return (match[1] or match[2] or "").strip() if match else ""


def read_form(body: bytes, content_type: str, max_images: int) -> list[Part]:
    """A body and its content type, which is multipart/*, to the form's parts in the order sent.

    multipart/mixed is read like multipart/form-data, and its parts need no names: TorchServe does
    not parse it, which makes it the cheaper one for many images. Raises a RequestError if the form
    cannot be read. If only the content of a part cannot be, the error is the part's value.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind not in ("multipart/form-data", MIXED):
        raise MalformedRequest(f"the body is {kind[:40]}; send multipart/form-data instead")
    allowance = _Allowance(max_images)
    parts = []
    for segment, content in _split(body, content_type, allowance):
        # curl sends -F 'file=@a.jpg,b.jpg' as one part that is itself a form of nameless parts.
        nested = segment.content_type == MIXED
        files = (
            _split(content, segment["Content-Type"], allowance) if nested else [(segment, content)]
        )
        for file, data in files:
            name = segment.name or file.name or ("file" if kind == MIXED else None)
            if name is None:
                raise MalformedRequest(
                    "a part of the form has no name; its header must be "
                    "'Content-Disposition: form-data; name=\"file\"'"
                )
            parts.append(Part(_text(name), _decode(file, data), _filename(file)))
    return parts


def _split(
    body: bytes, content_type: str, allowance: _Allowance
) -> Iterator[tuple[MultipartSegment, bytes]]:
    """The parts of a form, each as its headers and its bytes."""
    boundary = read_boundary(content_type)
    if not boundary:
        raise MalformedRequest(
            "the Content-Type is multipart without a boundary; leave the header to the client's "
            "library (curl -F, requests' files=), which knows the boundary that it writes"
        )
    found = False
    try:
        # As latin-1 every header can be read, and be turned back into the bytes that were sent.
        parser = _Parser(
            boundary.encode("latin-1", "replace"),
            max_header_size=MAX_HEADER,
            max_header_count=MAX_HEADERS,
            header_charset="latin-1",
        )
        for event in parser.parse(body):
            if isinstance(event, MultipartSegment):
                allowance.spend(event)
                segment, content, found = event, b"", True
            elif event is None:
                yield segment, content
            else:
                content += event  # all of it: the body is one chunk, and the first += is no copy
    except MultipartError as exc:
        raise MalformedRequest(
            f"the multipart body is broken: {exc.args[0]}; each part must begin with a line "
            "--boundary, then headers and an empty line, and lines must end in CR LF"
        ) from exc
    try:
        parser.close()
    except MultipartError as exc:
        raise MalformedRequest(
            "the multipart body is truncated: it lacks the closing --boundary--; send it whole"
            if found
            else "the multipart body does not hold the boundary that its Content-Type names"
        ) from exc


def _decode(segment: MultipartSegment, content: bytes) -> bytes | InvalidBase64:
    """A part's content as it was before its Content-Transfer-Encoding."""
    encoding = _text(segment.header("Content-Transfer-Encoding", "binary")).strip().lower()
    if encoding in ("binary", "8bit", "7bit"):
        return content
    if encoding == "base64":
        return decode_base64(content.translate(None, BLANKS))
    if encoding == "quoted-printable":
        return binascii.a2b_qp(content)
    raise MalformedRequest(
        f"unknown Content-Transfer-Encoding {encoding[:40]!r}; "
        "known: binary, 8bit, 7bit, base64, quoted-printable"
    )


def decode_base64(data: bytes) -> bytes | InvalidBase64:
    """Base64 without blanks to bytes; what is wrong with it comes back, unraised."""
    try:
        return base64.b64decode(data, validate=True)
    except ValueError:
        return InvalidBase64("the image is not valid base64")


def _filename(segment: MultipartSegment) -> str | None:
    """The name of a part's file; one with its charset (filename*=) goes over one without."""
    extended = _EXTENDED_FILENAME.search(segment.header("Content-Disposition", ""))
    if extended:
        return unquote(extended[2], extended[1])
    return _text(segment.filename or "") or None


def _text(header: str) -> str:
    """What a client meant by a header that was read as latin-1: UTF-8, in practice."""
    return header.encode("latin-1").decode("utf-8", "replace")
