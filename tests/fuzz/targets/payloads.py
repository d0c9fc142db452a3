"""Rows of any form and content, as TorchServe or the gateway hands them over.

The first byte says which way the request came, the first line is its type, then its fields.
"""

import json
from typing import Any

from handler.answers import encode, failure
from handler.errors import RequestError
from handler.fields import MAX_TEXT
from handler.payloads import ImageRequest, protocol_of, read_request
from handler.pixels import RawPixels
from handler.replies import refuse
from handler.settings import Settings
from tests.fuzz.target import Target

CLASSES = 10
SETTINGS = Settings(max_images=4, max_image_bytes=2000)
FIELD = b"\x00\x00"  # ends a field of a row that TorchServe has taken apart


def check(data: bytes) -> None:
    check_row(*arrived(data))


def check_row(row: dict[str, Any], headers: dict[str, str]) -> ImageRequest | None:
    """A row is read, or refused in the protocol of its request."""
    try:
        request = read_request(row, headers, CLASSES, SETTINGS)
    except RequestError as error:
        check_refusal(error)
        reply = refuse(error, protocol_of(row, headers))
        assert (reply.status, json.loads(reply.body) != {}) == (error.status, True)
        return None
    check_request(request)
    return request


def check_request(request: ImageRequest) -> None:
    """What every request that is not refused has."""
    assert 1 <= len(request.images) <= SETTINGS.max_images
    assert len(request.filenames) == len(request.images)
    assert request.wants_list or len(request.images) == 1
    assert type(request.top_k) is int
    assert 1 <= request.top_k <= CLASSES
    for image in request.images:
        if isinstance(image, RequestError):
            check_refusal(image)
        elif isinstance(image, RawPixels):
            width, height = image.size
            assert len(image.data) == width * height * 3 > 0
        else:
            assert type(image) is bytes
    for name in request.filenames:
        assert name is None or len(name) <= MAX_TEXT
        encode({"filename": name})


def check_refusal(error: RequestError) -> None:
    """It can be sent, and is short."""
    assert error.status in (400, 413, 415)
    assert len(encode(failure(error))) < 2000


def arrived(data: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """A row and its headers."""
    way = data[0] % 4 if data else 0
    first, _, rest = data[1:].partition(b"\n")
    content_type = first.decode("latin-1")
    if way == 0:  # through the gateway
        return {"body": bytearray(rest)}, {"x-body-type": content_type}
    if way == 1:
        return {"body": bytearray(rest)}, {"content-type": content_type, "x-top-k": "3"}
    if way == 2:  # parsed by TorchServe already
        try:
            body = json.loads(rest)
        except (ValueError, RecursionError):
            body = rest.decode("utf-8", "replace")
        return {"body": body}, {"content-type": content_type}
    pairs = [field.partition(b"=") for field in rest.split(FIELD)]
    fields = {name.decode("latin-1"): bytearray(value) for name, _, value in pairs}
    return fields, {"content-type": content_type, "x-top-k": content_type[-3:]}


def form(*parts: bytes) -> bytes:
    whole = b"".join(b"--b\r\nContent-Disposition: form-data; " + part + b"\r\n" for part in parts)
    return b"multipart/form-data; boundary=b\n" + whole + b"--b--\r\n"


def seeds() -> list[bytes]:
    mixed = (
        b'name="file"\r\nContent-Type: multipart/mixed; boundary=c\r\n\r\n'
        b'--c\r\nContent-Disposition: attachment; filename="a"\r\n\r\nA\r\n--c\r\n\r\nB\r\n--c--'
    )
    encoded = b'name="file"\r\nContent-Transfer-Encoding: base64\r\n\r\naGVsbG8='
    quoted = b'name="file"\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\nh=65l=\r\nlo'
    named = b"name=file; filename*=utf-8''%e2%82%ac.jpg; filename=\"x\"\r\n\r\nhello"
    whole = form(b'name="file"; filename="a.jpg"\r\n\r\nhello', b'name="top_k"\r\n\r\n3')
    json_one = b'{"image": "aGVsbG8=", "top_k": 3, "filename": "a"}'
    json_many = b'{"images": ["aGVsbG8=", "data:image/png;base64,aGk=", 3, "http://x"]}'
    deep = b"[" * 3000
    bodies = [
        b"image/jpeg\nhello",
        whole,
        form(mixed, encoded),
        form(quoted, named),
        b"application/json\n" + json_one,
        b"\n" + json_many,
        b"application/json\n" + deep,
        b'application/json\n{"image": ' + deep,
        b"application/x-www-form-urlencoded\nhello",
    ]
    taken_apart = b"x\nfile=hello" + FIELD + b"file\n2=more" + FIELD + b"top_k=2"
    return [bytes([way]) + body for way in range(4) for body in bodies] + [b"\x03" + taken_apart]


TOKENS = (
    b"multipart/form-data; boundary=b\n multipart/mixed; boundary= application/json "
    b'Content-Disposition: form-data; name="file" filename="a" filename*=utf-8\'\'%e2 --b --b-- '
    b'Content-Transfer-Encoding: base64 quoted-printable image images top_k filename "data: '
    b";base64, http:// \\ud800 \\u0000 \r\n \r\n\r\n \x00\x00 body= null true 1e9 -1 [[ {{"
).split(b" ")
TARGET = Target(check=check, seeds=seeds, tokens=tuple(filter(None, TOKENS)))
