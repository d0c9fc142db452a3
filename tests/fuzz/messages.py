"""Messages and frames of gRPC as nobody should send them."""

import random
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from service.openinference import inference_pb2 as pb
from service.openinference.rest import TYPES

SERVICE = "/inference.GRPCInferenceService/"
METHODS = ("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata")
OTHERS = (
    "/grpc.health.v1.Health/Check",
    "/inference.GRPCInferenceService/RepositoryIndex",
    "/inference.GRPCInferenceService/",
    "/inference.Unknown/ModelInfer",
)
WORDS = (
    "",
    "image",
    "label",
    "mobilenet_v2",
    "1.0",
    "../../health",
    "a b",
    "\0",
    "x" * 300,
    "ü€😀",
)
PARAMETERS = ("top_k", "classification", "binary_data", "binary_data_size", "sequence_id", "")
SIZES = (-(2**63), -1, 0, 1, 2, 3, 224, 2**31, 2**63 - 1)
KEYS = (
    b"x-api-key",
    b"authorization",
    b"x-forwarded-for",
    b"traceparent",
    b"x-request-id",
    b"x-top-k",
    b"grpc-timeout",
    b"grpc-encoding",
    b"content-type",
    b"x-bin",
)


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class Message(NamedTuple):
    """A call's method and the bytes of its message."""

    kind: str
    method: str
    data: bytes


class Stream(NamedTuple):
    """What is sent on a connection."""

    kind: str
    data: bytes


def good(rng: random.Random) -> pb.ModelInferRequest:
    """A request that is answered."""
    request = pb.ModelInferRequest(model_name="mobilenet_v2", id=rng.choice(("", "an id")))
    body = rng.randbytes(rng.randrange(200))
    if rng.random() < 0.5:
        tensor = request.inputs.add(name="image", datatype="BYTES", shape=[1])
        raw, typed = struct.pack("<I", len(body)) + body, tensor.contents.bytes_contents
        elements: list[object] = [body]
    else:
        body = body.ljust(12, b"x")[:12]
        tensor = request.inputs.add(name="image", datatype="UINT8", shape=[1, 2, 2, 3])
        raw, elements = body, [*body]
        typed = tensor.contents.uint_contents  # type: ignore[assignment]
    if rng.random() < 0.5:
        tensor.ClearField("contents")
        request.raw_input_contents.append(raw)
    else:
        typed.extend(elements)  # type: ignore[arg-type]
    if rng.random() < 0.3:
        request.parameters["top_k"].int64_param = rng.randint(1, 5)
    return request


def damaged(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, put in, taken out or repeated."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, len(changed))
        kind = rng.randrange(4)
        if kind == 0 and at < len(changed):
            changed[at] = rng.randrange(256)
        elif kind == 1:
            changed[at:at] = rng.randbytes(rng.randint(1, 8))
        elif kind == 2:
            del changed[at : at + rng.randint(1, 20)]
        else:
            changed[at:at] = changed[at : at + rng.randint(1, 40)] * rng.randint(1, 50)
    return bytes(changed)


def odd(rng: random.Random) -> pb.ModelInferRequest:
    """A well-formed message with values that do not fit together."""
    request = good(rng)
    for _ in range(rng.randint(1, 4)):
        rng.choice(ODDITIES)(request, rng)
    return request


def _names(request: pb.ModelInferRequest, rng: random.Random) -> None:
    for name in ("model_name", "model_version", "id"):
        if rng.random() < 0.4:
            setattr(request, name, rng.choice(WORDS))


def _input(request: pb.ModelInferRequest, rng: random.Random) -> None:
    for tensor in request.inputs:
        tensor.name = rng.choice(WORDS)
        tensor.datatype = rng.choice((*TYPES, "FP16", "STRING", "", "uint8"))


def _shape(request: pb.ModelInferRequest, rng: random.Random) -> None:
    for tensor in request.inputs:
        tensor.shape[:] = [rng.choice(SIZES) for _ in range(rng.randrange(6))]


def _more_inputs(request: pb.ModelInferRequest, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 3)):
        request.inputs.add(name=rng.choice(WORDS), datatype=rng.choice((*TYPES,)))


def _contents(request: pb.ModelInferRequest, rng: random.Random) -> None:
    for tensor in request.inputs:
        name, _ = TYPES[rng.choice((*TYPES,))]
        value = b"\xff" if name == "bytes_contents" else rng.randint(0, 1)
        getattr(tensor.contents, name).extend([value] * rng.randrange(20))
        tensor.contents.uint_contents.extend([2**32 - 1] * rng.randrange(2))


def _raw(request: pb.ModelInferRequest, rng: random.Random) -> None:
    lengths = (b"", b"\xff\xff\xff\xff", b"\0\0\0\0", struct.pack("<I", 7))
    for _ in range(rng.randint(1, 3)):
        request.raw_input_contents.append(rng.choice(lengths) + rng.randbytes(rng.randrange(9)))


def _parameters(request: pb.ModelInferRequest, rng: random.Random) -> None:
    request.outputs.add(name=rng.choice((*WORDS, "probabilities")))
    places: list[Any] = [request, *request.inputs, *request.outputs]
    for place in rng.sample(places, rng.randint(1, len(places))):
        parameter = place.parameters[rng.choice((*PARAMETERS, *WORDS))]
        name = rng.choice(
            ("bool_param", "int64_param", "string_param", "double_param", "uint64_param", "")
        )
        if name == "string_param":
            parameter.string_param = rng.choice(WORDS)
        elif name == "double_param":
            parameter.double_param = rng.choice((1.5, float("nan"), float("inf"), -0.0))
        elif name == "bool_param":
            parameter.bool_param = rng.random() < 0.5
        elif name:
            setattr(parameter, name, rng.choice((0, 1, 5, 2**63 - 1)))


ODDITIES: tuple[Callable[[pb.ModelInferRequest, random.Random], None], ...] = (
    _names,
    _input,
    _shape,
    _more_inputs,
    _contents,
    _raw,
    _parameters,
)


def message(rng: random.Random) -> Message:
    """One of all kinds."""
    infer = f"{SERVICE}ModelInfer"
    kind = rng.choice(("good", "odd", "odd", "odd", "damaged", "damaged", "random", "other"))
    if kind == "good":
        return Message(kind, infer, good(rng).SerializeToString())
    if kind == "odd":
        return Message(kind, infer, odd(rng).SerializeToString())
    if kind == "damaged":
        return Message(kind, infer, damaged(odd(rng).SerializeToString(), rng))
    if kind == "random":
        return Message(kind, infer, rng.randbytes(rng.randrange(100)))
    method = rng.choice((*(SERVICE + name for name in METHODS), *OTHERS))
    named = pb.ModelReadyRequest(name=rng.choice(WORDS), version=rng.choice(WORDS))
    data = rng.choice((b"", named.SerializeToString(), rng.randbytes(rng.randrange(40))))
    return Message(kind, method, data)


def stream(rng: random.Random) -> Stream:
    """A call in frames of HTTP/2 (RFC 9113), one of them as it should not be."""
    kind = rng.choice(("frames", "metadata", "prefix", "damaged frames"))
    data = good(rng).SerializeToString()
    metadata = []
    if kind == "metadata":
        for _ in range(rng.randint(1, 3)):
            value = rng.choice((rng.randbytes(rng.randrange(100)), b"1S", b"gzip", b"a" * 100))
            metadata.append((rng.choice(KEYS), value))
    prefix = (0, len(data))
    if kind == "prefix":
        lengths = (0, 1, len(data) + 1, 2**24, 2**32 - 1)
        prefix = rng.choice((0, 1, 2, 255)), rng.choice(lengths)
    extra = b""
    if kind == "frames":
        extra = frame(rng.randrange(12), rng.randrange(256), rng.randrange(4), rng.randbytes(8))
    sent = call_in_frames(metadata, data, prefix, extra)
    if kind == "damaged frames":
        sent = PREFACE + damaged(sent[len(PREFACE) :], rng)
    return Stream(kind, sent)


def call_in_frames(
    metadata: Sequence[tuple[bytes, bytes]],
    data: bytes,
    prefix: tuple[int, int] | None = None,
    extra: bytes = b"",
    path: bytes = f"{SERVICE}ModelInfer".encode(),
) -> bytes:
    """All that a client sends on a connection for one call of ModelInfer.

    `prefix` is gRPC's own of the message: whether it is compressed, and its length.
    """
    headers = [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", path),
        (b":authority", b"x"),
        (b"content-type", b"application/grpc"),
        (b"te", b"trailers"),
        *metadata,
    ]
    block = b"".join(
        b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value for name, value in headers
    )  # HPACK: literals without indexing or Huffman's code, each shorter than 127 bytes
    message = struct.pack(">BI", *(prefix or (0, len(data)))) + data
    return PREFACE + frame(4, 0, 0, b"") + extra + frame(1, 4, 1, block) + frame(0, 1, 1, message)


def frame(kind: int, flags: int, number: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + struct.pack(">BBI", kind, flags, number) + payload
