"""What several forms of a request have: base64 images, top_k, parameters, and a limit of images."""

import re
from collections.abc import Mapping
from typing import Any

import orjson

from handler.errors import (
    ImageTooLarge,
    InvalidBase64,
    InvalidTopK,
    MalformedRequest,
    RequestError,
    TooManyImages,
)
from handler.forms import BLANKS, decode_base64
from handler.settings import Settings

DEFAULT_LEVEL = 0.9  # of a set
LEVELS = (0.5, 0.99)
MAX_TEXT = 255  # characters of a text that the answer repeats
SURROGATE = re.compile("[\ud800-\udfff]")  # half of a pair, which JSON may spell and UTF-8 not hold


def parse_json(data: bytes | memoryview) -> Any:
    """Raises MalformedRequest."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as exc:
        raise MalformedRequest("the body is not valid JSON") from exc


def check_text(name: str, value: Any) -> None:
    """Raise MalformedRequest unless the value is text, or None, that an answer can repeat."""
    if value is None:
        return
    if not isinstance(value, str) or len(value) > MAX_TEXT or SURROGATE.search(value):
        raise MalformedRequest(f"{name} must be text of at most {MAX_TEXT} characters")


def check_count(images: int, settings: Settings) -> None:
    """Raise TooManyImages."""
    if images > settings.max_images:
        raise TooManyImages(f"the request has {images} images, the limit is {settings.max_images}")


def decode_text(entry: Any, settings: Settings) -> bytes | RequestError:
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


def read_parameters(owner: Mapping[str, Any], of: str) -> Mapping[str, Any]:
    """The `parameters` of a part of a V1 or V2 request. Raises MalformedRequest."""
    parameters = owner.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise MalformedRequest(f"the parameters of {of} must be an object")
    return parameters


def read_top_k(value: Any, headers: Mapping[str, Any], classes: int, settings: Settings) -> int:
    """The number of classes to answer with: field, then header X-Top-K, then the setting."""
    if value is None:
        value = headers.get("x-top-k")
    if value is None:
        return min(settings.top_k, classes)
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,9}\s*", value):
        value = int(value.strip())  # \s are more than int() takes: "3\x1d"
    return check_number("top_k", value, classes)


def check_number(name: str, value: Any, classes: int) -> int:
    """A number of classes. Raises InvalidTopK."""
    if type(value) is not int or not 1 <= value <= classes:
        raise InvalidTopK(f"{name} must be a whole number from 1 to {classes}")
    return value


def read_level(name: str, value: Any) -> float | None:
    """A share of cases: the default one for true, None for false. Raises MalformedRequest."""
    if value is None or (flag := as_flag(value)) is False:
        return None
    if flag:
        return DEFAULT_LEVEL
    if isinstance(value, str) and re.fullmatch(r"\s*0?\.[0-9]{1,6}\s*", value):
        value = float(value.strip())  # as with top_k
    if type(value) is not float or not LEVELS[0] <= value <= LEVELS[1]:
        raise MalformedRequest(
            f"{name} must be true, false or a number from {LEVELS[0]} to {LEVELS[1]}"
        )
    return value


def read_flag(name: str, value: Any) -> bool:
    """Raises MalformedRequest."""
    flag = False if value is None else as_flag(value)
    if flag is None:
        raise MalformedRequest(f"{name} must be true or false")
    return flag


def as_flag(value: Any) -> bool | None:
    """True or false, as JSON or text; None for anything else."""
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.strip().lower())
    return value if isinstance(value, bool) else None
