"""Requests of V2: JSON and binary tensors of any content, and built ones, which come back as built.

The first byte says how the request came; of one with binary tensors, the first line is the header.
"""

import json
import struct
from base64 import b64encode
from typing import Any

import numpy as np

from handler.answers import best_classes, success
from handler.payloads import ImageRequest, protocol_of, read_request
from handler.pixels import RawPixels
from handler.protocol_v2 import OUTPUTS
from handler.replies import Reply, make_reply
from tests.fuzz.target import Choices, Target
from tests.fuzz.targets.payloads import CLASSES, SETTINGS, check_row

LENGTH = "inference-header-content-length"
LABELS = tuple(f"class {number}" for number in range(CLASSES))
PROBABILITIES = np.linspace(0.01, 0.19, CLASSES, dtype=np.float32)
WIDTHS = {"BYTES": None, "INT64": 8, "FP32": 4}


def check(data: bytes) -> None:
    way = data[0] % 5 if data else 0
    rest = data[1:]
    if way == 4:
        check_built(Choices(rest))
        return
    row: dict[str, Any] = {"body": bytearray(rest)}
    headers = {"x-protocol": "v2"}
    if way == 1:  # straight at TorchServe, which tells no route
        headers = {"content-type": "application/json"}
    elif way == 2:
        try:
            row = {"body": json.loads(rest), "top_k": bytearray(b"2")}
        except (ValueError, RecursionError):
            row = {"data": bytearray(rest)}  # of TorchServe's own gRPC
        headers = {}
    elif way == 3:
        first, _, body = rest.partition(b"\n")
        row, headers = {"body": bytearray(body)}, {LENGTH: first.decode("latin-1")}
    request = check_row(row, headers)
    assert protocol_of(row, headers) == "v2" or way in (1, 2)
    if request and request.protocol == "v2":
        check_answer(request)


def check_answer(request: ImageRequest) -> None:
    """Whatever was asked for, there is an answer, and its tensors are as long as it says."""
    predictions = best_classes(PROBABILITIES, request.top_k, LABELS)
    count = len(request.images)
    results = [success(predictions, {}) for _ in range(count)]
    identity = {"model": "m", "version": "1.0"}
    reply = make_reply(request, results, [PROBABILITIES] * count, LABELS, identity)
    assert reply.status == 200
    check_tensors(reply, count)


def check_tensors(reply: Reply, count: int) -> None:
    length = len(reply.body) if reply.json_length is None else reply.json_length
    document, tensors = json.loads(reply.body[:length]), reply.body[length:]
    for output in document["outputs"]:
        rows, columns = output["shape"]
        assert rows == count
        assert output["name"] in OUTPUTS
        if "data" in output:
            assert len(output["data"]) == rows * columns
            continue
        size = output["parameters"]["binary_data_size"]
        tensor, tensors = tensors[:size], tensors[size:]
        assert len(tensor) == size
        width = WIDTHS[output["datatype"]]
        if width:
            assert size == rows * columns * width
            continue
        for _ in range(rows * columns):
            (text,) = struct.unpack_from("<I", tensor)
            assert tensor[4 : 4 + text].decode()
            tensor = tensor[4 + text :]
        assert not tensor
    assert not tensors


def check_built(choices: Choices) -> None:
    count = 1 + choices.number(SETTINGS.max_images)
    height, width = 1 + choices.number(6), 1 + choices.number(6)
    pixels, binary = choices.chance(), choices.chance()
    column = [1] if choices.chance() else []
    most = height * width * 3 if pixels else 60
    contents = [choices.blob(most) for _ in range(count)]
    tensor: dict[str, Any] = {"name": "image"}
    expected: list[Any] = contents
    if pixels:
        contents = [content.ljust(most, b"\7") for content in contents]
        expected = [RawPixels(content, (width, height)) for content in contents]
        tensor |= {"datatype": "UINT8", "shape": [count, height, width, 3]}
        whole = b"".join(contents)
        tensor["data"] = [*whole]
        if choices.chance():
            nested = np.frombuffer(whole, np.uint8).reshape(count, height, width, 3)
            tensor["data"] = nested.tolist()
    else:
        tensor |= {"datatype": "BYTES", "shape": [count, *column]}
        whole = b"".join(struct.pack("<I", len(content)) + content for content in contents)
        texts = [b64encode(content).decode() for content in contents]
        tensor["data"] = [[text] for text in texts] if column else texts
    document: dict[str, Any] = {"inputs": [tensor]}
    top_k = 1 + choices.number(CLASSES) if choices.chance() else None
    if top_k is not None:
        document["parameters"] = {"top_k": top_k}
    headers = {}
    body = b""
    if binary:
        del tensor["data"]
        tensor["parameters"] = {"binary_data_size": len(whole)}
        body = whole
    text = json.dumps(document, indent=choices.number(3) or None).encode()
    if binary or choices.chance():
        headers[LENGTH] = str(len(text))
    request = read_request({"body": bytearray(text + body)}, headers, CLASSES, SETTINGS)
    assert request.images == expected, (request.images, expected)
    assert request.top_k == (top_k or SETTINGS.top_k)
    check_answer(request)


def tensor(kind: bytes, shape: bytes, more: bytes) -> bytes:
    return b'{"name": "image", "datatype": "%s", "shape": %s, %s}' % (kind, shape, more)


def seeds() -> list[bytes]:
    encoded = tensor(b"BYTES", b"[2]", b'"data": ["aGk=", "aGVsbG8="]')
    pixels = tensor(b"UINT8", b"[1, 1, 2, 3]", b'"data": [[[[0, 1, 2], [3, 4, 255]]]]')
    outputs = (
        b'"id": "42", "parameters": {"top_k": 3, "binary_data_output": true}, "outputs": '
        b'[{"name": "label"}, {"name": "class_id", "parameters": {"binary_data": false}}, '
        b'{"name": "confidence"}, {"name": "probabilities", "parameters": {"classification": 2}}]'
    )
    documents = [b'{"inputs": [%s]}' % one for one in (encoded, pixels)]
    documents.append(b'{"inputs": [%s], %s}' % (encoded, outputs))
    documents.append(b'{"inputs": [%s]}' % tensor(b"UINT8", b"[1,1,1,3]", b'"data": ' + b"[" * 999))
    texts = [bytes([way]) + document for way in range(3) for document in documents]
    behind = {
        b'"parameters": {"binary_data_size": 15}': b"\2\0\0\0hi\5\0\0\0hello",
        b'"parameters": {"binary_data_size": 6}': b"\0\1\2\3\4\5",
    }
    shapes = (b"BYTES", b"[2, 1]"), (b"UINT8", b"[1, 1, 2, 3]")
    for (kind, shape), (parameters, data) in zip(shapes, behind.items(), strict=True):
        text = b'{"inputs": [%s], %s}' % (tensor(kind, shape, parameters), outputs)
        texts.append(b"\3%d\n" % len(text) + text + data)
    return texts + [bytes([4, *range(first, first + 60)]) for first in range(24)]


def repair(data: bytes) -> bytes:
    """The header's length, and the size of what follows, right again."""
    way, rest = data[:1], data[1:]
    first, _, body = rest.partition(b"\n")
    end = body.rfind(b"}") + 1
    if not way or way[0] % 5 != 3 or not end or len(first) > 20:
        return data
    text, tensors = body[:end], body[end:]
    before, mark, after = text.partition(b'"binary_data_size": ')
    if mark:
        text = before + mark + b"%d" % len(tensors) + after.lstrip(b"-0123456789")
    return way + b"%d\n" % len(text) + text + tensors


TOKENS = (
    b'"inputs": "outputs": "parameters": "id": "name": "image" "label" "class_id" "confidence" '
    b'"probabilities" "datatype": "BYTES" "UINT8" "shape": [1,1,1,3] [2,1] "data": "top_k": '
    b'"binary_data": "binary_data_size": "binary_data_output": "classification": true null \\ud800 '
    b"\2\0\0\0 \xff\xff\xff\xff [[ ]] 1e9 -1 2147483647 99999999999999999999 255 256"
).split(b" ")
TARGET = Target(check=check, seeds=seeds, tokens=tuple(TOKENS), repair=repair)
