"""The Open Inference Protocol (V2) over REST, with Triton's binary tensors and classification.

Sources: rest_predict_v2 and open_inference_rest.yaml of kserve/open-inference-protocol, and
docs/protocol/extension_binary_data.md and extension_classification.md of
triton-inference-server/server. Fields and parameters that are unknown here are ignored, because
clients send some of their own.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Any, Literal

import numpy as np
import orjson
from numpy.typing import NDArray

from handler.answers import Answer, best_classes
from handler.errors import MalformedRequest, NoImage, RequestError
from handler.fields import check_count, check_number, check_text, decode_text, read_parameters
from handler.pixels import RawPixels
from handler.settings import Settings

JSON_LENGTH = "Inference-Header-Content-Length"  # bytes of the JSON, which binary tensors follow
INPUT = "image"
OUTPUTS = ("label", "class_id", "confidence", "probabilities")
EXPLANATION = "explanation"  # the output that an explained request has besides those it asks for
MAX_SIDE = 2**31

_LENGTH = struct.Struct("<I")  # before each element of a binary BYTES tensor

Tensor = list[str] | NDArray[np.int64] | NDArray[np.float32] | NDArray[np.bool_]


@dataclass(frozen=True)
class Output:
    """A tensor that a client asks for."""

    name: str  # of OUTPUTS, or EXPLANATION
    binary: bool = False  # behind the JSON, instead of in it
    classes: int = 0  # of the classification extension; 0: the tensor itself


@dataclass(frozen=True)
class Wanted:
    """What the answer to a request has."""

    outputs: tuple[Output, ...] = tuple(map(Output, OUTPUTS))
    id: str | None = None
    binary: bool = False  # of outputs that are not among these: those of `set` and `unknown`


DEFAULT = Wanted()


def split(body: Any, headers: Mapping[str, Any]) -> tuple[Any, memoryview]:
    """A body to its JSON and the binary tensors behind it, as the header says; most have none.

    Raises MalformedRequest.
    """
    length = headers.get(JSON_LENGTH.lower())
    if length is None or not isinstance(body, bytes):
        return body, memoryview(b"")
    digits = str(length).strip()
    if not (digits.isascii() and digits.isdigit() and len(digits) < 10):
        raise MalformedRequest(f"{JSON_LENGTH} must be the bytes of the JSON, such as 148")
    if int(digits) > len(body):
        raise MalformedRequest(f"{JSON_LENGTH} is {int(digits)}, the body has {len(body)} bytes")
    return body[: int(digits)], memoryview(body)[int(digits) :]


def read(
    document: Mapping[str, Any], tensors: memoryview, settings: Settings
) -> list[bytes | RawPixels | RequestError]:
    """The images of the input, or what is wrong with one of them.

    Raises MalformedRequest, NoImage or TooManyImages.
    """
    tensor = _read_input(document)
    parameters = read_parameters(tensor, f"input '{INPUT}'")
    shape, encoded = _read_shape(tensor)
    if shape[0] == 0:
        raise NoImage(f"input '{INPUT}' is empty")
    check_count(shape[0], settings)
    size = parameters.get("binary_data_size")
    if size is None:
        if tensors:
            raise MalformedRequest(
                f"the body has {len(tensors)} bytes behind its JSON; give the binary_data_size of "
                f"input '{INPUT}'"
            )
        values = _flat(tensor.get("data"))
        _check_size(len(values), "elements", shape)
        if encoded:
            return [decode_text(value, settings) for value in values]
        return _pictures(_as_bytes(values), shape)
    if type(size) is not int or size != len(tensors):
        raise MalformedRequest(
            f"binary_data_size must be the bytes behind the JSON, which are {len(tensors)}"
        )
    if "data" in tensor:
        raise MalformedRequest(f"input '{INPUT}' has both data and binary_data_size")
    if encoded:
        return _elements(tensors, shape[0])
    _check_size(len(tensors), "bytes", shape)
    return _pictures(tensors, shape)


def _read_input(document: Mapping[str, Any]) -> Mapping[str, Any]:
    inputs = document.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise MalformedRequest(f"a V2 request needs 'inputs', a list of one: '{INPUT}'")
    tensor: dict[str, Any] = inputs[0]
    if tensor.get("name") != INPUT:
        raise MalformedRequest(f"the input must have the name '{INPUT}'")
    return tensor


def _read_shape(tensor: Mapping[str, Any]) -> tuple[list[int], bool]:
    """The shape of the input, and whether it is of encoded images."""
    shape = tensor.get("shape")
    if isinstance(shape, list) and all(
        type(side) is int and 0 <= side < MAX_SIDE for side in shape
    ):
        match tensor.get("datatype"), shape:
            case "BYTES", [_] | [_, 1]:
                return shape, True
            case "UINT8", [_, height, width, 3] if height and width:
                return shape, False
    raise MalformedRequest(
        f"input '{INPUT}' must be BYTES of shape [n] or [n, 1], which are encoded images, or UINT8 "
        "of shape [n, height, width, 3], which are RGB pixels"
    )


def _check_size(found: int, unit: str, shape: Sequence[int]) -> None:
    if found != prod(shape):
        raise MalformedRequest(
            f"input '{INPUT}' has {found} {unit}, its shape {list(shape)} says {prod(shape)}"
        )


def _flat(data: Any) -> list[Any]:
    """The elements of a tensor in JSON, which may be nested as its shape is, or flat."""
    if not isinstance(data, list):
        raise MalformedRequest(f"input '{INPUT}' needs data, a list, or binary_data_size")
    while data and all(type(one) is list for one in data):
        data = list(chain.from_iterable(data))
    return data


def _as_bytes(values: list[Any]) -> bytes:
    problem = MalformedRequest(
        f"input '{INPUT}' is UINT8: its data must be whole numbers from 0 to 255"
    )
    if bool in set(map(type, values)):  # true and false, which bytes() takes for 1 and 0
        raise problem
    try:
        return bytes(values)
    except (TypeError, ValueError, OverflowError) as exc:
        raise problem from exc


def _pictures(
    pixels: bytes | memoryview, shape: Sequence[int]
) -> list[bytes | RawPixels | RequestError]:
    """uint8 RGB [n, H, W, 3] to its images."""
    count, height, width, _ = shape
    size = height * width * 3
    return [
        RawPixels(bytes(pixels[at : at + size]), (width, height))
        for at in range(0, count * size, size)
    ]


def _elements(tensor: memoryview, count: int) -> list[bytes | RawPixels | RequestError]:
    """The elements of a binary BYTES tensor: each is its length, then so many bytes."""
    elements: list[bytes | RawPixels | RequestError] = []
    at = 0
    while at < len(tensor) and len(elements) < count:
        start = at + _LENGTH.size
        if start > len(tensor):
            break
        at = start + _LENGTH.unpack_from(tensor, at)[0]
        if at > len(tensor):
            break
        elements.append(bytes(tensor[start:at]))
    if len(elements) != count or at != len(tensor):
        raise MalformedRequest(
            f"the binary data of input '{INPUT}' must be {count} times a length of 4 bytes, little "
            "endian, and so many bytes"
        )
    return elements


def read_wanted(document: Mapping[str, Any], classes: int, *, explain: bool = False) -> Wanted:
    """What a request asks for. Raises MalformedRequest or InvalidTopK."""
    check_text("id", document.get("id"))
    parameters = read_parameters(document, "the request")
    binary = _read_flag(parameters, "binary_data_output", default=False)
    asked = document.get("outputs")
    if asked is not None and not isinstance(asked, list):
        raise MalformedRequest("'outputs' must be a list")
    outputs: dict[str, Output] = {}
    for one in asked or [{"name": name} for name in OUTPUTS]:
        output = _read_output(one, binary, classes)
        if output.name in outputs:
            raise MalformedRequest(f"output '{output.name}' is asked for twice")
        outputs[output.name] = output
    if explain:
        outputs[EXPLANATION] = Output(EXPLANATION, binary)
    return Wanted(tuple(outputs.values()), document.get("id"), binary)


def _read_output(asked: Any, binary: bool, classes: int) -> Output:
    name = asked.get("name") if isinstance(asked, dict) else None
    if name not in OUTPUTS:
        raise MalformedRequest(f"each of 'outputs' must have a name of {', '.join(OUTPUTS)}")
    parameters = read_parameters(asked, f"output '{name}'")
    count = parameters.get("classification")
    if count is not None:
        if name != "probabilities":
            raise MalformedRequest("classification goes with the output 'probabilities'")
        check_number("classification", count, classes)
    return Output(name, _read_flag(parameters, "binary_data", default=binary), count or 0)


def _read_flag(parameters: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = parameters.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise MalformedRequest(f"{name} must be true or false")
    return value


def answer(
    wanted: Wanted,
    results: Sequence[Answer],
    probabilities: Sequence[NDArray[np.float32]],
    labels: Sequence[str],
    identity: Mapping[str, str],
) -> tuple[bytes, int | None]:
    """The body of an answer, and the bytes of its JSON if binary tensors follow.

    `probabilities` are float32 [C] for each of the results, which are those of images that were all
    classified. What `identity` has is the model's name and version.
    """
    document: Answer = {"model_name": identity["model"], "model_version": identity["version"]}
    if wanted.id is not None:
        document["id"] = wanted.id
    outputs: list[Answer] = []
    tensors = []
    found = [
        (output.name, output.binary, *_tensor(output, results, probabilities, labels))
        for output in wanted.outputs
    ]
    found += [(name, wanted.binary, *tensor) for name, tensor in _judgements(results).items()]
    for name, binary, datatype, values in found:
        shape = [len(results), len(values) // len(results)]
        described: Answer = {"name": name, "datatype": datatype, "shape": shape}
        if binary:
            tensors.append(_as_binary(values))
            described["parameters"] = {"binary_data_size": len(tensors[-1])}
        else:
            described["data"] = values
        outputs.append(described)
    text = orjson.dumps(document | {"outputs": outputs}, option=orjson.OPT_SERIALIZE_NUMPY)
    return b"".join([text, *tensors]), len(text) if tensors else None


Datatype = Literal["BYTES", "INT64", "FP32", "BOOL"]


def _tensor(
    output: Output,
    results: Sequence[Answer],
    probabilities: Sequence[NDArray[np.float32]],
    labels: Sequence[str],
) -> tuple[Datatype, Tensor]:
    """An output's type, and its elements in a row."""
    best = [one for result in results for one in result["predictions"]]
    match output.name:
        case "label":
            return "BYTES", [one["class"] for one in best]
        case "class_id":
            return "INT64", np.array([one["class_id"] for one in best], np.int64)
        case "confidence":
            return "FP32", np.array([one["confidence"] for one in best], np.float32)
        case "explanation":
            return "BYTES", [orjson.dumps(one["explanation"]).decode() for one in results]
    if not output.classes:
        return "FP32", np.concatenate(probabilities)
    return "BYTES", [
        f"{one['confidence']:f}:{one['class_id']}:{one['class']}"
        for row in probabilities
        for one in best_classes(row, output.classes, labels)
    ]


def _judgements(results: Sequence[Answer]) -> dict[str, tuple[Datatype, Tensor]]:
    """The outputs [n, 1] that the parameters `set` and `unknown` add.

    Sets are of different lengths, so each is one element: its classes as a JSON list.
    """
    found: dict[str, tuple[Datatype, Tensor]] = {}
    if "set" in results[0]:
        found["set"] = "BYTES", [orjson.dumps(result["set"]).decode() for result in results]
    if "unknown" in results[0]:
        found["unknown"] = "BOOL", np.array([result["unknown"] for result in results])
    return found


def _as_binary(values: Tensor) -> bytes:
    """Little endian, and each element of BYTES behind its length."""
    if isinstance(values, list):
        texts = [value.encode() for value in values]
        return b"".join(_LENGTH.pack(len(text)) + text for text in texts)
    return values.astype(values.dtype.newbyteorder("<")).tobytes()
