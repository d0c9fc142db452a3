"""Requests of V1: JSON of any form, as the gateway or TorchServe hands it over."""

import json
from typing import Any

from handler.payloads import protocol_of
from tests.fuzz.target import Target
from tests.fuzz.targets.payloads import check_row


def check(data: bytes) -> None:
    way = data[0] % 3 if data else 0
    text = data[1:]
    row: dict[str, Any] = {"body": bytearray(text)}
    headers = {"x-protocol": "v1", "x-body-type": "application/json"}
    if way == 1:  # straight at TorchServe, which tells no route
        headers = {"content-type": "application/json", "x-top-k": "3"}
    elif way == 2:  # and has parsed the document
        try:
            row = {"body": json.loads(text), "top_k": bytearray(b"2")}
        except (ValueError, RecursionError):
            row = {"data": bytearray(text)}  # of TorchServe's own gRPC
        headers = {}
    check_row(row, headers)
    assert protocol_of(row, headers) == "v1" or way


def seeds() -> list[bytes]:
    instances = [
        b'"aGVsbG8="',
        b'{"b64": "aGVsbG8="}',
        b'{"image": {"b64": "aGk="}}, {"image_bytes": {"b64": "aGk="}}, {"image": "aGk="}',
        b'"data:image/png;base64,aGk=", 3, null, {"b64": 3}',
        b"[" * 3000,
    ]
    documents = [b'{"instances": [' + one + b"]}" for one in instances]
    documents += [
        b'{"instances": ["aGk="], "parameters": {"top_k": 3}}',
        b'{"instances": [], "parameters": []}',
        b'{"inputs": []}',
    ]
    return [bytes([way]) + document for way in range(3) for document in documents]


TOKENS = (
    b'"instances": "parameters": {"top_k": "b64": "image": "image_bytes": "inputs": "data: '
    b";base64, http:// \\ud800 null true 1e9 -1 [[ {{ ]} NaN 99999999999999999999"
).split(b" ")
TARGET = Target(check=check, seeds=seeds, tokens=tuple(TOKENS))
