"""Tensors to send, made from what the server says of its model. No packages are needed."""

import base64
import math
import struct
import zlib
from typing import Any

from tests.conformance.checks import Json, Subject

# Bytes of an element, and how the struct module writes it.
FORMATS = {
    "BOOL": "?", "INT8": "b", "INT16": "h", "INT32": "i", "INT64": "q",
    "UINT8": "B", "UINT16": "H", "UINT32": "I", "UINT64": "Q", "FP16": "e", "FP32": "f",
    "FP64": "d",
}  # fmt: skip
# The field of gRPC's InferTensorContents, without its _contents. FP16 is always raw.
CONTENTS = {
    "BOOL": "bool", "INT8": "int", "INT16": "int", "INT32": "int", "INT64": "int64",
    "UINT8": "uint", "UINT16": "uint", "UINT32": "uint", "UINT64": "uint64",
    "FP32": "fp32", "FP64": "fp64", "BYTES": "bytes",
}  # fmt: skip
OTHER = {"BYTES": "FP32"}  # a datatype that an input of another datatype has not


def drawn_images() -> list[bytes]:
    """Three PNGs of 64 x 48: stripes, a gradient and a red square on blue."""

    def stripes(x: int, y: int) -> tuple[int, int, int]:
        return (230, 200, 40) if x // 8 % 2 else (20, 90, 60)

    def gradient(x: int, y: int) -> tuple[int, int, int]:
        return (4 * x, 5 * y, 128)

    def square(x: int, y: int) -> tuple[int, int, int]:
        return (220, 20, 30) if 16 <= x < 48 and 8 <= y < 40 else (20, 40, 200)

    return [
        png(64, 48, [channel for y in range(48) for x in range(64) for channel in draw(x, y)])
        for draw in (stripes, gradient, square)
    ]


def png(width: int, height: int, pixels: list[int]) -> bytes:
    """An RGB image of 8 bits; pixels are width * height * 3 numbers, row after row."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checked = kind + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    row = 3 * width
    rows = b"".join(b"\0" + bytes(pixels[y * row : (y + 1) * row]) for y in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def takes_images(inputs: list[Json]) -> bool:
    """Whether a model is an image classifier of encoded images: one input, of BYTES, `image`."""
    return [(tensor["name"], tensor["datatype"]) for tensor in inputs] == [("image", "BYTES")]


def shape_of(tensor: Json, batch: int = 1) -> list[int]:
    """A shape that fits a metadata's: the first open dimension is the batch, the others are 1."""
    shape = [int(size) for size in tensor["shape"]]
    for position, size in enumerate(shape):
        if size == -1:
            shape[position] = batch if position == 0 else 1
    return shape


def elements(subject: Subject, tensor: Json, image: int = 0, batch: int = 1) -> list[Any]:
    """Values of an input: numbers, or bytes. Images follow each other from number `image` on."""
    count = math.prod(shape_of(tensor, batch))
    if tensor["datatype"] != "BYTES":
        return [0] * count
    if not subject.images:
        return [b"x"] * count
    images = subject.images
    return [base64.b64decode(images[(image + i) % len(images)]) for i in range(count)]


def json_input(subject: Subject, tensor: Json, image: int = 0, batch: int = 1) -> Json:
    """An input of a JSON request; encoded images are base64, other BYTES are text."""
    values = elements(subject, tensor, image, batch)
    if tensor["datatype"] == "BYTES":
        encode = base64.b64encode if subject.images else bytes
        values = [encode(value).decode() for value in values]
    if tensor["datatype"] == "BOOL":
        values = [bool(value) for value in values]
    return {
        "name": tensor["name"],
        "shape": shape_of(tensor, batch),
        "datatype": tensor["datatype"],
        "data": values,
    }


def json_request(subject: Subject, image: int = 0, batch: int = 1, **more: Any) -> Json:
    tensors = subject.needs_inputs()
    return {"inputs": [json_input(subject, tensor, image, batch) for tensor in tensors], **more}


def raw(datatype: str, values: list[Any]) -> bytes:
    """Elements as the binary data extension and gRPC's raw contents write them."""
    if datatype == "BYTES":
        return b"".join(struct.pack("<I", len(value)) + value for value in values)
    return struct.pack(f"<{len(values)}{FORMATS[datatype]}", *values)


def binary_request(subject: Subject, image: int = 0, **more: Any) -> tuple[Json, bytes]:
    """The JSON object of a request with binary inputs, and the data that follows it."""
    inputs, data = [], b""
    for tensor in subject.needs_inputs():
        content = raw(tensor["datatype"], elements(subject, tensor, image))
        described = {name: tensor[name] for name in ("name", "datatype")}
        size = {"binary_data_size": len(content)}
        inputs.append(described | {"shape": shape_of(tensor), "parameters": size})
        data += content
    return {"inputs": inputs, **more}, data
