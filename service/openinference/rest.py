"""Messages of gRPC to bodies of V2 over REST, with tensors as binary data, and back.

The forms are those of kserve/open-inference-protocol, specification/protocol/inference_rest.md, and
of the binary tensor data extension: triton-inference-server/server,
docs/protocol/extension_binary_data.md. What a tensor means is the handler's business.
"""

from array import array
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import orjson

from service.openinference import inference_pb2 as pb

# Datatype -> the field of InferTensorContents for its elements, and how `array` has them.
# All platforms of ours are little-endian, as binary tensors are.
TYPES = {
    "BOOL": ("bool_contents", "B"),
    "UINT8": ("uint_contents", "B"),
    "UINT16": ("uint_contents", "H"),
    "UINT32": ("uint_contents", "I"),
    "UINT64": ("uint64_contents", "Q"),
    "INT8": ("int_contents", "b"),
    "INT16": ("int_contents", "h"),
    "INT32": ("int_contents", "i"),
    "INT64": ("int64_contents", "q"),
    "FP32": ("fp32_contents", "f"),
    "FP64": ("fp64_contents", "d"),
    "BYTES": ("bytes_contents", ""),
}
LENGTH_BYTES = 4  # before each element of BYTES
TRANSPORT = {"binary_data", "binary_data_size", "binary_data_output"}  # REST's own parameters


class InvalidMessage(Exception):
    """A message is not what the protocol says; for the client."""


class Body(NamedTuple):
    """A JSON document, and the tensors that it describes behind it."""

    data: bytes
    json_bytes: int  # of the document: Inference-Header-Content-Length


def to_rest(request: pb.ModelInferRequest) -> Body:
    """The body of POST /v2/models/M/infer, which asks for all outputs as binary data.

    Raises InvalidMessage.
    """
    blobs = list(request.raw_input_contents)
    if not blobs:
        blobs = [_elements(number, each) for number, each in enumerate(request.inputs)]
    elif len(blobs) != len(request.inputs):
        raise InvalidMessage(
            f"there are {len(request.inputs)} inputs and {len(blobs)} raw_input_contents"
        )
    elif any(each.HasField("contents") for each in request.inputs):
        raise InvalidMessage("an input has contents although there are raw_input_contents")
    document: dict[str, Any] = {
        "parameters": _values(request.parameters) | {"binary_data_output": True},
        "inputs": [
            {
                "name": each.name,
                "datatype": each.datatype,
                "shape": list(each.shape),
                "parameters": _values(each.parameters) | {"binary_data_size": len(blob)},
            }
            for each, blob in zip(request.inputs, blobs, strict=True)
        ],
    }
    if request.id:
        document["id"] = request.id
    if request.outputs:
        document["outputs"] = [
            {"name": each.name, "parameters": _values(each.parameters)} for each in request.outputs
        ]
    text = orjson.dumps(document)
    return Body(b"".join([text, *blobs]), len(text))


def _elements(number: int, tensor: pb.ModelInferRequest.InferInputTensor) -> bytes:
    """The contents of an input as binary data."""
    name, code = TYPES.get(tensor.datatype, ("", ""))
    if filled := {field.name for field, _ in tensor.contents.ListFields()} - {name}:
        known = (
            f"that of {tensor.datatype} is {name}" if name else "that of its datatype is unknown"
        )
        raise InvalidMessage(f"input {number} has {', '.join(sorted(filled))}; {known}")
    if tensor.datatype == "BYTES":
        return b"".join(
            len(each).to_bytes(LENGTH_BYTES, "little") + each
            for each in tensor.contents.bytes_contents
        )
    elements = getattr(tensor.contents, name) if name else ()
    try:
        return array(code or "B", elements).tobytes()
    except OverflowError:
        raise InvalidMessage(
            f"input {number} has an element that is no {tensor.datatype}"
        ) from None


def _values(parameters: Mapping[str, pb.InferParameter]) -> dict[str, Any]:
    """Parameters as JSON has them, without those that REST alone has."""
    found = {}
    for name, parameter in parameters.items():
        kind = parameter.WhichOneof("parameter_choice")
        if kind is None:
            raise InvalidMessage("a parameter has no value")
        if name not in TRANSPORT:
            found[name] = getattr(parameter, kind)
    return found


def from_rest(body: Body, raw: bool) -> pb.ModelInferResponse:
    """The message for a V2 answer whose outputs are all binary data.

    `raw`: its tensors become raw_output_contents. Raises ValueError, KeyError or TypeError if it is
    no such answer.
    """
    document = orjson.loads(memoryview(body.data)[: body.json_bytes])
    answer = pb.ModelInferResponse(
        model_name=document["model_name"],
        model_version=document.get("model_version", ""),
        id=document.get("id", ""),
    )
    _set(answer.parameters, document.get("parameters", {}))
    at = body.json_bytes
    for output in document["outputs"]:
        parameters = output["parameters"]
        end = at + parameters["binary_data_size"]
        blob, at = body.data[at:end], end
        tensor = answer.outputs.add(
            name=output["name"], datatype=output["datatype"], shape=output["shape"]
        )
        _set(tensor.parameters, parameters)
        if raw:
            answer.raw_output_contents.append(blob)
        else:
            name, code = TYPES[tensor.datatype]
            elements = array(code, blob) if code else _byte_strings(blob)
            getattr(tensor.contents, name).extend(elements)
    if at != len(body.data):
        raise ValueError("the tensors have other sizes than the document says")
    return answer


def _byte_strings(blob: bytes) -> Iterable[bytes]:
    """The elements of a tensor of BYTES."""
    at = 0
    while at < len(blob):
        start = at + LENGTH_BYTES
        at = start + int.from_bytes(blob[at:start], "little")
        yield blob[start:at]


def _set(parameters: Any, values: Mapping[str, Any]) -> None:
    """Put JSON's values into a map of InferParameter."""
    kinds = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}
    for name, value in values.items():
        if name not in TRANSPORT:
            setattr(parameters[name], kinds[type(value)], value)


def to_metadata(document: Mapping[str, Any]) -> pb.ModelMetadataResponse:
    """The message for GET /v2/models/M."""
    return pb.ModelMetadataResponse(
        name=document["name"],
        versions=document.get("versions", []),
        platform=document["platform"],
        inputs=[_described(each) for each in document["inputs"]],
        outputs=[_described(each) for each in document["outputs"]],
    )


def _described(tensor: Mapping[str, Any]) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(
        name=tensor["name"], datatype=tensor["datatype"], shape=tensor["shape"]
    )
