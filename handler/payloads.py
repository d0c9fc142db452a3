"""One row of a batch to images and options, whatever the form of its body.

What arrives (ts/service.py, ts/protocol/otf_message_handler.py of TorchServe 0.12): a raw body is
{"body": bytearray}, and from the gateway every body is raw, its content type in X-Body-Type;
multipart is one entry for each part; `/{model}/predict?top_k=3` adds its query to either; JSON is
already parsed and text already a str, unless decode_input_request is off; a broken multipart body
is {}. The map of TorchServe's own gRPC is such a row; its clients name the only entry "data".
"""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from handler import protocol_v1, protocol_v2
from handler.errors import MalformedRequest, NoImage, RequestError
from handler.explanations import Explain, read_explain
from handler.fields import (
    MAX_TEXT,
    check_count,
    check_text,
    decode_text,
    parse_json,
    read_flag,
    read_level,
    read_parameters,
    read_top_k,
)
from handler.forms import REPEATED, Part, read_boundary, read_form
from handler.pixels import RawPixels
from handler.protocol_v2 import Wanted
from handler.settings import Settings

IMAGE_PART = re.compile(r"(file|image|data|body)\d*")
OPTIONS = ("top_k", "filename", "set", "unknown", "explain", "explain_class")
WHOLE = ("body", "data")  # what the only entry of a row is called if it may be a JSON document

Protocol = Literal["own", "v1", "v2"]


@dataclass(frozen=True, kw_only=True)
class ImageRequest:
    """What one client asked for."""

    images: list[bytes | RawPixels | RequestError]  # in the order sent; a bad one is no exception
    wants_list: bool  # whether the request's form gets a list of results
    top_k: int
    filenames: list[str | None]  # of the images, in the same order
    protocol: Protocol = "own"  # in which it is answered
    wanted: Wanted = protocol_v2.DEFAULT  # of V2
    level: float | None = None  # of the set that is asked for; None: of none
    unknown: bool = False  # whether to say if the image is unlike those of the calibration
    explain: Explain | None = None

    def classes_of(self, total: int) -> int:
        """How many of the likeliest classes its answer needs, of all that there are.

        0 if it needs the image's pixels, which no cache has.
        """
        if self.unknown:
            return 0
        if self.level is not None:
            return total
        if self.protocol != "v2":
            return self.top_k
        tensors = (one for one in self.wanted.outputs if one.name == "probabilities")
        return max([self.top_k, *(one.classes or total for one in tensors)])


def read_request(
    row: Mapping[str, Any], headers: Mapping[str, Any], classes: int, settings: Settings
) -> ImageRequest:
    """A row and its headers (names in lower case) to an ImageRequest.

    Raises a RequestError if the request as a whole cannot be answered.
    """
    stated = _stated_protocol(headers)
    content_type = str(headers.get("x-body-type", headers.get("content-type", ""))).strip()
    if stated:
        content_type = "application/json"  # V2 with binary tensors has another, and no client's own
    parts = _parts(row, headers, content_type, settings)
    options = _options(parts)
    files = [part for part in parts if part.name not in OPTIONS]
    names = [part.name for part in files]
    content_type = content_type.lower()
    if len(files) == 1 and names[0] in WHOLE:
        body, tensors = protocol_v2.split(files[0].value, headers)
        document = _json_document(body, content_type)
        if document is not None:
            protocol = stated or _protocol_of(document)
            if protocol != "own":
                return _read_open(protocol, document, tensors, options, headers, classes, settings)
            # An option in the document is nearer to the image than the same one in the query.
            return _read_json(options | document, headers, classes, settings)
    if stated:
        raise MalformedRequest(f"a request of {stated.upper()} is one JSON document")
    if content_type.startswith("application/x-www-form-urlencoded"):
        raise MalformedRequest(
            "the body came as a web form; with curl use -T FILE or -F file=@FILE, "
            "or name the type with -H 'Content-Type: image/jpeg'"
        )
    top_k = read_top_k(options["top_k"], headers, classes, settings)
    filename = options["filename"]
    check_text("filename", filename)
    unknown = [name for name in names if not IMAGE_PART.fullmatch(name)]
    if unknown:
        raise MalformedRequest(
            f"unknown field {unknown[0][:40]!r}; known: file, file1, file2, …, {', '.join(OPTIONS)}"
        )
    if not files and content_type.startswith("multipart/"):
        raise MalformedRequest("the multipart body is broken, or has no part named 'file'")
    images: list[bytes | RawPixels | RequestError] = [
        part.value if isinstance(part.value, RequestError) else _bytes(part.value) for part in files
    ]
    if not images or images == [b""]:
        raise NoImage("the request has no image; send it as the body or as a part named 'file'")
    wants_list = len(images) > 1
    check_count(len(images), settings)
    if wants_list and filename is not None:
        raise MalformedRequest("filename goes with one image, and the request has several")
    filenames = [part.filename and part.filename[:MAX_TEXT] for part in files]
    if filename is not None:
        filenames = [filename]
    return ImageRequest(
        images=images,
        wants_list=wants_list,
        top_k=top_k,
        filenames=filenames,
        **_read_wishes(options, headers, classes),
    )


def _read_wishes(
    options: Mapping[str, Any], headers: Mapping[str, Any], classes: int
) -> dict[str, Any]:
    """What else of ImageRequest the options ask for; those of the gateway's query are headers."""
    level, unknown = (
        headers.get(f"x-{name}") if options.get(name) is None else options[name]
        for name in ("set", "unknown")
    )
    wishes = {"explain": read_explain(options, headers, classes)}
    if level is None and unknown is None:
        return wishes
    return wishes | {"level": read_level("set", level), "unknown": read_flag("unknown", unknown)}


def protocol_of(row: Mapping[str, Any], headers: Mapping[str, Any]) -> Protocol:
    """The protocol of a request that was refused, in which the client expects to be told so."""
    stated = _stated_protocol(headers)
    if stated:
        return stated
    for name in WHOLE:
        if name in row:
            value = row[name]
            with suppress(MalformedRequest, MemoryError):
                body = bytes(value) if isinstance(value, bytearray) else value
                return _protocol_of(_json_document(body, "") or {})
    return "own"


def _stated_protocol(headers: Mapping[str, Any]) -> Literal["v1", "v2"] | None:
    """What the gateway says, which knows the route, or a header that only V2 has."""
    match headers.get("x-protocol"):
        case "v1":
            return "v1"
        case "v2":
            return "v2"
    return "v2" if protocol_v2.JSON_LENGTH.lower() in headers else None


def _protocol_of(document: Mapping[str, Any]) -> Protocol:
    """The protocol of a JSON document: TorchServe does not tell a handler its route."""
    return "v1" if "instances" in document else "v2" if "inputs" in document else "own"


def _parts(
    row: Mapping[str, Any], headers: Mapping[str, Any], content_type: str, settings: Settings
) -> list[Part]:
    """A row's parts, in the order sent; a body that is a whole form is replaced by its parts."""
    parts = []
    for name, value in row.items():
        if name == "body" and _is_form(value, headers, content_type):
            parts += read_form(value, content_type, settings.max_images)
        else:
            # Bytes from here on: whoever copies them later, such as BytesIO, gets them for nothing.
            data = bytes(value) if isinstance(value, bytearray) else value
            parts.append(Part(name.partition(REPEATED)[0], data))
    return parts


def _is_form(body: Any, headers: Mapping[str, Any], content_type: str) -> bool:
    """Whether a body is a form as the client sent it, and not a part called "body" of one.

    TorchServe takes apart the multipart/form-data that comes under its own Content-Type, except
    that in which it finds no boundary.
    """
    kind = content_type.lower()
    if not kind.startswith("multipart/") or not isinstance(body, bytes | bytearray):
        return False
    boundary = read_boundary(content_type).encode("latin-1", "replace")
    parsed = kind.startswith("multipart/form-data") and "x-body-type" not in headers and boundary
    return bool(body) and (not parsed or body.startswith(b"--" + boundary))


def _options(parts: list[Part]) -> dict[str, str | None]:
    """The options among the parts, as text; None for one that is not there."""
    options: dict[str, str | None] = dict.fromkeys(OPTIONS)
    for part in parts:
        if part.name in OPTIONS:
            if isinstance(part.value, RequestError):
                raise part.value
            text = _text(part.value)
            if options[part.name] not in (None, text):
                raise MalformedRequest(f"{part.name} came twice with two values; send it once")
            options[part.name] = text
    return options


def _json_document(body: Any, content_type: str) -> dict[str, Any] | None:
    """The body as a JSON object, or None if it is not meant as JSON."""
    if isinstance(body, RequestError):
        return None
    if not isinstance(body, dict | list):
        data = _bytes(body)
        if not content_type.startswith("application/json") and not data.lstrip().startswith(b"{"):
            return None
        body = parse_json(data)
    if not isinstance(body, dict):
        raise MalformedRequest(
            "the JSON body must be an object with 'image' or 'images', 'instances' (V1) or "
            "'inputs' (V2)"
        )
    return body


def _read_open(
    protocol: Protocol,
    document: dict[str, Any],
    tensors: memoryview,
    options: Mapping[str, Any],
    headers: Mapping[str, Any],
    classes: int,
    settings: Settings,
) -> ImageRequest:
    """A document of V1 or V2, and the binary tensors behind one of V2."""
    options = {**options, **read_parameters(document, "the request")}
    wishes = _read_wishes(options, headers, classes)
    images: list[bytes | RawPixels | RequestError]
    if protocol == "v1":
        images, wanted = protocol_v1.read(document, settings), protocol_v2.DEFAULT
    else:
        images = protocol_v2.read(document, tensors, settings)
        explain = wishes["explain"] is not None
        wanted = protocol_v2.read_wanted(document, classes, explain=explain)
    return ImageRequest(
        images=images,
        wants_list=True,
        top_k=read_top_k(options["top_k"], headers, classes, settings),
        filenames=[None] * len(images),
        protocol=protocol,
        wanted=wanted,
        **wishes,
    )


def _read_json(
    document: dict[str, Any], headers: Mapping[str, Any], classes: int, settings: Settings
) -> ImageRequest:
    unknown = set(document) - {"image", "images", *OPTIONS}
    if unknown:
        raise MalformedRequest(
            f"unknown field {min(unknown)[:40]!r}; known: image, images, {', '.join(OPTIONS)}"
        )
    wants_list = "images" in document
    if wants_list == ("image" in document):
        raise NoImage("the JSON body needs 'image' or 'images', and not both")
    entries = document["images"] if wants_list else [document["image"]]
    if not isinstance(entries, list):
        raise MalformedRequest("'images' must be a list of base64 strings")
    if not entries:
        raise NoImage("'images' is empty")
    check_count(len(entries), settings)
    filename = document["filename"]
    check_text("filename", filename)
    if wants_list and filename is not None:
        raise MalformedRequest("filename goes with 'image', not with 'images'")
    top_k = read_top_k(document["top_k"], headers, classes, settings)
    images: list[bytes | RawPixels | RequestError]
    images = [decode_text(entry, settings) for entry in entries]
    if not wants_list and isinstance(images[0], RequestError):
        raise images[0]
    return ImageRequest(
        images=images,
        wants_list=wants_list,
        top_k=top_k,
        filenames=[filename] * len(images),
        **_read_wishes(document, headers, classes),
    )


def _bytes(value: Any) -> bytes:
    """A part's value, which TorchServe hands over as bytes, str (text/*) or parsed JSON."""
    if isinstance(value, bytes):
        return value
    text = value if isinstance(value, str) else json.dumps(value)
    return text.encode("utf-8", "replace")


def _text(value: Any) -> str | None:
    return None if value is None else _bytes(value).decode("utf-8", "replace")
