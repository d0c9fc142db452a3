"""Messages of gRPC as bodies of V2 over REST, byte by byte."""

import json

import pytest

from service.openinference import inference_pb2 as pb
from service.openinference.rest import Body, InvalidMessage, from_rest, to_rest

TWO = {  # 1 and 2 in each datatype, and as binary data
    "BOOL": ("bool_contents", [True, False], b"\1\0"),
    "UINT8": ("uint_contents", [1, 255], b"\1\xff"),
    "UINT16": ("uint_contents", [1, 2], b"\1\0\2\0"),
    "UINT32": ("uint_contents", [1, 2], b"\1\0\0\0\2\0\0\0"),
    "UINT64": ("uint64_contents", [1, 2], b"\1" + bytes(7) + b"\2" + bytes(7)),
    "INT8": ("int_contents", [1, -1], b"\1\xff"),
    "INT16": ("int_contents", [1, -1], b"\1\0\xff\xff"),
    "INT32": ("int_contents", [1, -1], b"\1\0\0\0\xff\xff\xff\xff"),
    "INT64": ("int64_contents", [1, -1], b"\1" + bytes(7) + b"\xff" * 8),
    "FP32": ("fp32_contents", [1, 2], b"\0\0\x80\x3f\0\0\0\x40"),
    "FP64": ("fp64_contents", [1, 2], bytes(6) + b"\xf0\x3f" + bytes(7) + b"\x40"),
    "BYTES": ("bytes_contents", [b"a", b""], b"\1\0\0\0a\0\0\0\0"),
}
each_datatype = pytest.mark.parametrize(
    ("datatype", "field", "elements", "binary"), [(name, *facts) for name, facts in TWO.items()]
)


@each_datatype
def test_typed_contents_become_binary_data(
    datatype: str, field: str, elements: list[object], binary: bytes
) -> None:
    request = pb.ModelInferRequest()
    tensor = request.inputs.add(name="image", datatype=datatype, shape=[2])
    getattr(tensor.contents, field).extend(elements)
    body = to_rest(request)
    assert body.data[body.json_bytes :] == binary
    [described] = json.loads(body.data[: body.json_bytes])["inputs"]
    assert described["parameters"] == {"binary_data_size": len(binary)}


@each_datatype
def test_binary_data_becomes_typed_contents(
    datatype: str, field: str, elements: list[object], binary: bytes
) -> None:
    head = json.dumps(
        {
            "model_name": "m",
            "outputs": [
                {
                    "name": "o",
                    "datatype": datatype,
                    "shape": [2],
                    "parameters": {"binary_data_size": len(binary), "a": 1.5, "b": True},
                }
            ],
        }
    ).encode()
    answer = from_rest(Body(head + binary, len(head)), raw=False)
    [output] = answer.outputs
    assert list(getattr(output.contents, field)) == elements
    assert {
        name: value.WhichOneof("parameter_choice") for name, value in output.parameters.items()
    } == {
        "a": "double_param",
        "b": "bool_param",
    }
    raw = from_rest(Body(head + binary, len(head)), raw=True)
    assert list(raw.raw_output_contents) == [binary]


def test_sixteen_bit_floats_are_raw_only() -> None:
    request = pb.ModelInferRequest(raw_input_contents=[b"\0\x3c"])
    request.inputs.add(name="image", datatype="FP16", shape=[1])
    body = to_rest(request)
    assert body.data[body.json_bytes :] == b"\0\x3c"
    request = pb.ModelInferRequest()
    request.inputs.add(datatype="FP16").contents.fp32_contents.append(1)
    with pytest.raises(InvalidMessage, match="input 0 has fp32_contents"):
        to_rest(request)


@pytest.mark.parametrize("size", [3, 5])
def test_an_answer_whose_sizes_are_wrong_is_none(size: int) -> None:
    parameters = {"binary_data_size": size}
    output = {"name": "o", "datatype": "INT32", "shape": [1], "parameters": parameters}
    head = json.dumps({"model_name": "m", "outputs": [output]}).encode()
    with pytest.raises(ValueError, match="sizes"):
        from_rest(Body(head + bytes(4), len(head)), raw=True)
