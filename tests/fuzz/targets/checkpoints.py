"""Weights files: read without running code, or refused.

The first byte says what the rest is: a whole file, the pickle of a zip as torch.save writes it, the
header of safetensors, or a pickle in torch's older form.
"""

import io
import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from typing import Any

import torch
from safetensors.torch import save
from torch._weights_only_unpickler import Unpickler

from handler.errors import InvalidModel
from service.archive.checkpoints import find_tables, read_checkpoint
from tests.fuzz.target import Target, as_file

STORAGE = bytes(range(64))
CANARY: list[object] = []  # what a pickle that runs code would add to


def check(data: bytes) -> None:
    kind, rest = (data[0] % 4, data[1:]) if data else (0, b"")
    path = as_file((whole, in_zip, in_safetensors, whole)[kind](rest), ".pth")
    try:
        checkpoint = find_tables(read_checkpoint(path), path)
    except InvalidModel as error:
        assert len(str(error)) < 5000, len(str(error))
        return
    finally:
        assert not CANARY
    assert checkpoint.tables
    for table in checkpoint.tables.values():
        assert table
        for name, tensor in table.items():
            assert isinstance(name, str)
            assert isinstance(tensor, torch.Tensor)
            if tensor.layout == torch.strided and tensor.device.type == "cpu":
                tensor.detach().flatten()[-1:].tolist()  # its memory is there


def whole(data: bytes) -> bytes:
    return data


def in_zip(data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as written:
        for name, content in (("data.pkl", data), ("version", b"3\n"), ("data/0", STORAGE)):
            written.writestr(f"a/{name}", content)
    return file.getvalue()


def in_safetensors(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data + STORAGE


class Runs:
    """What a hostile pickle holds: a call of any function."""

    def __reduce__(self) -> Any:
        return CANARY.append, (1,)


def saved(content: object, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def pickled(content: object) -> bytes:
    """data.pkl of a file of torch's."""
    with zipfile.ZipFile(io.BytesIO(saved(content))) as file:
        return next(file.read(name) for name in file.namelist() if name.endswith("data.pkl"))


def nested(levels: int) -> bytes:
    """The pickle of a dict in a dict in a dict."""
    return b"\x80\x02" + b"}X\x01\0\0\0a" * levels + b"}" + b"s" * levels + b"."


def seeds() -> list[bytes]:
    state = {"fc.weight": torch.ones(2, 3), "fc.bias": torch.zeros(2)}
    contents: list[object] = [
        state,
        {
            "epoch": 3,
            "model": OrderedDict(state),
            "args": {"lr": 0.1},
            "half": torch.ones(2).half(),
        },
        [torch.ones(1)],
        {"shared": state["fc.weight"].T, "sparse": torch.ones(2, 2).to_sparse()},
        {"parameter": torch.nn.Parameter(torch.ones(2))},
    ]
    header = json.loads(save(state)[8 : 8 + int.from_bytes(save(state)[:8], "little")])
    headers = [json.dumps(header).encode(), b'{"__metadata__": {"a": "b"}}', b"{" * 2000]
    run = pickle.dumps(Runs(), 2)
    return [
        *(b"\0" + saved(content) for content in contents),
        b"\0" + save(state),
        b"\0" + run,
        b"\0version https://git-lfs",
        *(b"\1" + pickled(content) for content in contents),
        b"\1" + run,
        b"\1" + nested(10),
        b"\1" + nested(450),
        *(b"\2" + text for text in headers),
        *(b"\3" + saved(each, _use_new_zipfile_serialization=False) for each in contents[:3]),
    ]


TOKENS = (
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch\nFloatStorage\n",
    b"cos\nsystem\n",
    b"R",
    b".",
    b"ccollections\nOrderedDict\n",
    b"\x80\x02",
    b"(",
    b"t",
    b"Q",
    b"}",
    b"s",
    b"u",
    b"K\x01",
    b"h\0",
    b"J\xff\xff\xff\x7f",
    b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"b",
    b"q\0",
    b"r\0\0\0\x01",
    b'"dtype":',
    b'"F32"',
    b'"shape":',
    b'"data_offsets":',
    b"[0,4]",
    b"18446744073709551615",
)
TARGET = Target(
    check=check, seeds=seeds, tokens=TOKENS, guides=((Unpickler, "load"),), max_bytes=8192
)
