"""Requests built from images and options: what was put in comes back, whatever the form."""

import json
from base64 import b64encode

from handler.payloads import read_request
from tests.fuzz.target import Choices, Target
from tests.fuzz.targets.payloads import CLASSES, SETTINGS

BOUNDARIES = ("b", "----WebKitFormBoundaryAbC", "=_Part_1", "a b'c()+_,-./:=?d")
NAMES = ("file", "image", "data", "body")
MARKS = '\\";%\r\n\0'  # which file names have their own spelling for


def check(data: bytes) -> None:
    choices = Choices(data)
    count = 1 + choices.number(SETTINGS.max_images)
    images = [b"\xff" + choices.blob(60) for _ in range(count)]  # none looks like JSON
    top_k = 1 + choices.number(CLASSES) if choices.chance() else None
    filename = choices.text(20) if choices.chance() else None
    build = choices.one_of((raw, as_json, as_form))
    content_type, body, expected, names = build(choices, images, top_k, filename)
    headers = {"x-body-type": content_type}
    if top_k is not None and build is raw:
        headers["x-top-k"] = str(top_k)
    request = read_request({"body": bytearray(body)}, headers, CLASSES, SETTINGS)
    assert request.images == expected, (request.images, expected)
    assert request.top_k == (top_k or SETTINGS.top_k)
    assert request.filenames == names, (request.filenames, names)


Built = tuple[str, bytes, list[bytes], list[str | None]]


def raw(choices: Choices, images: list[bytes], top_k: int | None, filename: str | None) -> Built:
    kind = choices.one_of(("image/jpeg", "", "application/octet-stream"))
    return kind, images[0], images[:1], [None]


def as_json(
    choices: Choices, images: list[bytes], top_k: int | None, filename: str | None
) -> Built:
    texts = []
    for image in images:
        text = b64encode(image).decode()
        if choices.chance():
            text = "\r\n".join(text[at : at + 8] for at in range(0, len(text), 8))
        texts.append(f"data:image/png;base64,{text}" if choices.chance() else text)
    document: dict[str, object] = {}
    if choices.chance():
        document["images"] = texts
        names: list[str | None] = [None] * len(images)
    else:
        images = images[:1]
        document["image"] = texts[0]
        names = [filename]
        document["filename"] = filename
    document["top_k"] = str(top_k) if choices.chance() and top_k else top_k
    body = json.dumps(document, indent=choices.number(3) or None, ensure_ascii=choices.chance())
    kind = choices.one_of(("application/json", "", "application/json; charset=utf-8"))
    return kind, body.encode(), images, names


def as_form(
    choices: Choices, images: list[bytes], top_k: int | None, filename: str | None
) -> Built:
    boundary = choices.one_of(BOUNDARIES)
    kept, names, parts = [], [], []
    for image in images:
        content = image.replace(f"--{boundary}".encode(), b"")
        name = "".join(
            mark for mark in choices.text(20) if mark not in MARKS and mark.isprintable()
        )
        name = name.strip()
        head = f'form-data; name="{choices.one_of(NAMES)}"; filename="{name}"'
        encoding = ""
        sent = content
        if choices.chance():
            encoding, sent = "Content-Transfer-Encoding: base64\r\n", b64encode(content)
        lines = f"--{boundary}\r\nContent-Disposition: {head}\r\n{encoding}\r\n"
        parts.append(lines.encode() + sent + b"\r\n")
        kept.append(content)
        names.append(name or None)
    if top_k is not None:
        option = f'--{boundary}\r\nContent-Disposition: form-data; name="top_k"\r\n\r\n{top_k}\r\n'
        parts.insert(choices.number(len(parts) + 1), option.encode())
    quoted = f'"{boundary}"' if choices.chance() or ";" in boundary else boundary
    body = b"".join(parts) + f"--{boundary}--\r\n".encode()
    return f"multipart/form-data; boundary={quoted}", body, kept, names


def seeds() -> list[bytes]:
    return [bytes([kind, *range(first, first + 60)]) for kind in range(12) for first in (0, 1, 7)]


TARGET = Target(check=check, seeds=seeds, tokens=(b"--b", b"\r\n", b"--b--\r\n", b"{", b"\xe2\x82"))
