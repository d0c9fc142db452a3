"""One row of a batch to images and options, whatever the form of its body.

What arrives (ts/service.py, ts/protocol/otf_message_handler.py of TorchServe 0.12): a raw body is
{"body": bytearray}, and from the gateway every body is raw, its content type in X-Body-Type;
multipart is one entry for each part; `/{model}/predict?top_k=3` adds its query to either; JSON is
already parsed and text already a str, unless decode_input_request is off; a broken multipart body
is {}.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from handler.errors import (
    ImageTooLarge,
    InvalidBase64,
    InvalidTopK,
    MalformedRequest,
    NoImage,
    RequestError,
    TooManyImages,
)
from handler.forms import BLANKS, REPEATED, Part, decode_base64, read_boundary, read_form
from handler.settings import Settings

IMAGE_PART = re.compile(r"(file|image|data|body)\d*")
OPTIONS = ("top_k", "filename")
MAX_FILENAME = 255
SURROGATE = re.compile("[\ud800-\udfff]")  # half of a pair, which JSON may spell and UTF-8 not hold


@dataclass(frozen=True, kw_only=True)
class ImageRequest:
    """What one client asked for."""

    images: list[bytes | RequestError]  # encoded images in the order sent; a bad one fails alone
    wants_list: bool  # whether the request's form gets a list of results
    top_k: int
    filenames: list[str | None]  # of the images, in the same order


def read_request(
    row: Mapping[str, Any], headers: Mapping[str, Any], classes: int, settings: Settings
) -> ImageRequest:
    """A row and its headers (names in lower case) to an ImageRequest.

    Raises a RequestError if the request as a whole cannot be answered.
    """
    content_type = str(headers.get("x-body-type", headers.get("content-type", ""))).strip()
    parts = _parts(row, headers, content_type, settings)
    options = _options(parts)
    files = [part for part in parts if part.name not in OPTIONS]
    names = [part.name for part in files]
    content_type = content_type.lower()
    if names == ["body"]:
        document = _json_document(files[0].value, content_type)
        if document is not None:
            # An option in the document is nearer to the image than the same one in the query.
            return _read_json(options | document, headers, classes, settings)
    if content_type.startswith("application/x-www-form-urlencoded"):
        raise MalformedRequest(
            "the body came as a web form; with curl use -T FILE or -F file=@FILE, "
            "or name the type with -H 'Content-Type: image/jpeg'"
        )
    top_k = _top_k(options["top_k"], headers, classes, settings)
    filename = _filename(options["filename"])
    unknown = [name for name in names if not IMAGE_PART.fullmatch(name)]
    if unknown:
        raise MalformedRequest(
            f"unknown field {unknown[0][:40]!r}; known: file, file1, file2, …, top_k, filename"
        )
    if not files and content_type.startswith("multipart/"):
        raise MalformedRequest("the multipart body is broken, or has no part named 'file'")
    images: list[bytes | RequestError] = [
        part.value if isinstance(part.value, RequestError) else _bytes(part.value) for part in files
    ]
    if not images or images == [b""]:
        raise NoImage("the request has no image; send it as the body or as a part named 'file'")
    wants_list = len(images) > 1
    _check_count(len(images), settings)
    if wants_list and filename is not None:
        raise MalformedRequest("filename goes with one image, and the request has several")
    filenames = [part.filename and part.filename[:MAX_FILENAME] for part in files]
    if filename is not None:
        filenames = [filename]
    return ImageRequest(images=images, wants_list=wants_list, top_k=top_k, filenames=filenames)


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
        try:
            body = orjson.loads(data)
        except orjson.JSONDecodeError as exc:
            raise MalformedRequest("the body is not valid JSON") from exc
    if not isinstance(body, dict):
        raise MalformedRequest("the JSON body must be an object with 'image' or 'images'")
    return body


def _read_json(
    document: dict[str, Any], headers: Mapping[str, Any], classes: int, settings: Settings
) -> ImageRequest:
    unknown = set(document) - {"image", "images", "top_k", "filename"}
    if unknown:
        raise MalformedRequest(
            f"unknown field {min(unknown)[:40]!r}; known: image, images, top_k, filename"
        )
    wants_list = "images" in document
    if wants_list == ("image" in document):
        raise NoImage("the JSON body needs 'image' or 'images', and not both")
    entries = document["images"] if wants_list else [document["image"]]
    if not isinstance(entries, list):
        raise MalformedRequest("'images' must be a list of base64 strings")
    if not entries:
        raise NoImage("'images' is empty")
    _check_count(len(entries), settings)
    filename = _filename(document["filename"])
    if wants_list and filename is not None:
        raise MalformedRequest("filename goes with 'image', not with 'images'")
    top_k = _top_k(document["top_k"], headers, classes, settings)
    images = [_decode_base64(entry, settings) for entry in entries]
    if not wants_list and isinstance(images[0], RequestError):
        raise images[0]
    filenames = [filename] * len(images)
    return ImageRequest(images=images, wants_list=wants_list, top_k=top_k, filenames=filenames)


def _decode_base64(entry: Any, settings: Settings) -> bytes | RequestError:
    """A base64 string or data: URL to bytes; what is wrong with it comes back, unraised."""
    if not isinstance(entry, str):
        return MalformedRequest("an image in JSON must be a base64 string")
    if re.match(r"(?i)(https?|ftp|file|s3|gs)://", entry):
        return InvalidBase64("the image is a URL; URLs are not fetched, send the bytes as base64")
    if entry.startswith("data:"):
        kind, _, entry = entry.partition(",")
        if not kind.endswith(";base64"):
            return InvalidBase64("a data: URL must be of the form data:image/…;base64,…")
    data = entry.encode("utf-8", "replace").translate(None, BLANKS)  # base64 often comes in lines
    if len(data) // 4 * 3 > settings.max_image_bytes + 2:  # + 2: padding
        return ImageTooLarge(
            f"the image has about {len(data) // 4 * 3} bytes, "
            f"the limit is {settings.max_image_bytes}"
        )
    return decode_base64(data)


def _top_k(value: Any, headers: Mapping[str, Any], classes: int, settings: Settings) -> int:
    """The number of classes to answer with: field, then header X-Top-K, then the setting."""
    if value is None:
        value = headers.get("x-top-k")
    if value is None:
        return min(settings.top_k, classes)
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,9}\s*", value):
        value = int(value.strip())  # \s are more than int() takes: "3\x1d"
    if type(value) is not int or not 1 <= value <= classes:
        raise InvalidTopK(f"top_k must be a whole number from 1 to {classes}")
    return value


def _filename(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > MAX_FILENAME or SURROGATE.search(value):
        raise MalformedRequest(f"filename must be text of at most {MAX_FILENAME} characters")
    return value


def _check_count(images: int, settings: Settings) -> None:
    if images > settings.max_images:
        raise TooManyImages(f"the request has {images} images, the limit is {settings.max_images}")


def _bytes(value: Any) -> bytes:
    """A part's value, which TorchServe hands over as bytes, str (text/*) or parsed JSON."""
    if isinstance(value, bytes):
        return value
    text = value if isinstance(value, str) else json.dumps(value)
    return text.encode("utf-8", "replace")


def _text(value: Any) -> str | None:
    return None if value is None else _bytes(value).decode("utf-8", "replace")
