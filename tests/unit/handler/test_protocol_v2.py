"""Bodies of V2 to images and what is asked for: JSON, binary tensors, pixels, and each refusal."""

import base64
import json
import struct
from typing import Any

import pytest

from handler.errors import (
    InvalidBase64,
    InvalidTopK,
    MalformedRequest,
    NoImage,
    RequestError,
    TooManyImages,
)
from handler.payloads import ImageRequest, protocol_of, read_request
from handler.pixels import RawPixels
from handler.protocol_v2 import Output, Wanted
from handler.settings import Settings

A, B = b"\xff\xd8\xff one", b"\x89PNG another"
TEXT_A, TEXT_B = (base64.b64encode(image).decode() for image in (A, B))
STATED = {"x-protocol": "v2"}

# Two images of 2 x 1 pixels (width x height), whose bytes are 0 to 5 and 6 to 11.
NESTED = [[[[0, 1, 2], [3, 4, 5]]], [[[6, 7, 8], [9, 10, 11]]]]
PIXELS = [RawPixels(bytes(range(6)), (2, 1)), RawPixels(bytes(range(6, 12)), (2, 1))]


def tensor(**changes: Any) -> dict[str, Any]:
    whole: dict[str, Any] = {
        "name": "image",
        "shape": [2],
        "datatype": "BYTES",
        "data": [TEXT_A, TEXT_B],
    }
    return {name: value for name, value in (whole | changes).items() if value is not None}


def document(*, input: Any = None, **more: Any) -> dict[str, Any]:
    return {"inputs": [tensor() if input is None else input], **more}


def read(body: Any, headers: dict[str, Any] | None = None, **settings: Any) -> ImageRequest:
    return read_request({"body": body}, headers or {}, 1000, Settings(**settings))


def refusal(body: Any, headers: dict[str, Any] | None = None, **settings: Any) -> RequestError:
    with pytest.raises(RequestError) as raised:
        read(body, headers, **settings)
    return raised.value


def binary(
    data: bytes, size: Any = None, json_bytes: Any = None, **changes: Any
) -> tuple[bytearray, dict[str, Any]]:
    """A body with a binary tensor, and its headers."""
    parameters = {"binary_data_size": len(data) if size is None else size}
    text = json.dumps(document(input=tensor(parameters=parameters, **{"data": None, **changes})))
    length = str(len(text)) if json_bytes is None else json_bytes
    return bytearray(text.encode() + data), {"inference-header-content-length": length}


def elements(*images: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(image)) + image for image in images)


# --- JSON


@pytest.mark.parametrize(("shape", "data"), [([2], None), ([2, 1], None), ([2, 1], "nested")])
@pytest.mark.parametrize("form", ["parsed", "bytes", "bytearray", "text"])
def test_encoded_images_in_json(shape: list[int], data: str | None, form: str) -> None:
    values = [[TEXT_A], [TEXT_B]] if data else [TEXT_A, TEXT_B]
    whole = document(input=tensor(shape=shape, data=values))
    text = json.dumps(whole)
    forms = {"parsed": whole, "text": text}
    body = forms.get(form, bytearray(text.encode()) if form == "bytearray" else text.encode())
    for headers in ({}, STATED):
        assert read(body, headers) == ImageRequest(
            images=[A, B], wants_list=True, top_k=5, filenames=[None, None], protocol="v2"
        )


@pytest.mark.parametrize("data", [NESTED, list(range(12)), [[0, 1, 2, 3, 4, 5], [*range(6, 12)]]])
def test_pixels_in_json(data: Any) -> None:
    pixels = tensor(shape=[2, 1, 2, 3], datatype="UINT8", data=data)
    assert read(document(input=pixels)).images == PIXELS


@pytest.mark.parametrize(
    ("bad", "error"), [("%%%", InvalidBase64), (3, MalformedRequest), (None, MalformedRequest)]
)
def test_a_bad_element_is_known_by_its_place(bad: Any, error: type[RequestError]) -> None:
    request = read(document(input=tensor(data=[TEXT_A, bad])))
    assert request.images[0] == A
    assert type(request.images[1]) is error


# --- Binary tensors


@pytest.mark.parametrize("shape", [[2], [2, 1]])
@pytest.mark.parametrize("more", [{}, STATED, {"content-type": "application/octet-stream"}])
def test_encoded_images_behind_the_json(shape: list[int], more: dict[str, Any]) -> None:
    body, headers = binary(elements(A, B), shape=shape)
    request = read(body, headers | more)
    assert (request.images, request.protocol) == ([A, B], "v2")
    assert [type(image) for image in request.images] == [bytes, bytes]


def test_pixels_behind_the_json() -> None:
    body, headers = binary(bytes(range(12)), shape=[2, 1, 2, 3], datatype="UINT8")
    assert read(body, headers).images == PIXELS


def test_elements_may_be_empty() -> None:
    """Each fails alone, later, as any empty image does."""
    body, headers = binary(elements(b"", A))
    assert read(body, headers).images == [b"", A]


def test_the_header_of_a_body_that_is_all_json() -> None:
    text = json.dumps(document()).encode()
    headers = {"inference-header-content-length": str(len(text))}
    assert read(text, headers).images == [A, B]
    assert read(document(), headers).images == [A, B]


@pytest.mark.parametrize(
    "data",
    [
        elements(A),
        elements(A, B, B),
        elements(A, B) + b"\0",
        elements(A, B)[:-1],
        elements(A) + b"\1\0\0",
        elements(A) + b"\xff\xff\xff\xff" + B,
        b"",
        b"\0\0\0",
    ],
)
def test_elements_must_be_as_many_as_the_shape_says(data: bytes) -> None:
    error = refusal(*binary(data))
    assert type(error) is MalformedRequest
    assert "2 times a length of 4 bytes" in str(error)


@pytest.mark.parametrize("length", ["", "x", "-1", "1e3", "+5", "1_0", "٣", "9" * 10, "9" * 5000])
def test_the_header_must_be_digits(length: str) -> None:
    error = refusal(*binary(elements(A, B), json_bytes=length))
    assert type(error) is MalformedRequest
    assert "must be the bytes of the JSON" in str(error)


@pytest.mark.parametrize("length", ["0", "5", "100", "999999"])
def test_the_header_must_be_true(length: str) -> None:
    assert type(refusal(*binary(elements(A, B), json_bytes=length))) is MalformedRequest


@pytest.mark.parametrize("size", [0, 1, -1, 28, 10**30, "27", 27.0, True, [27]])
def test_the_size_must_be_that_of_all_that_follows(size: Any) -> None:
    error = refusal(*binary(elements(A, B), size=size))
    assert str(error) == "binary_data_size must be the bytes behind the JSON, which are 27"


def test_bytes_that_no_input_has() -> None:
    text = json.dumps(document()).encode()
    headers = {"inference-header-content-length": str(len(text))}
    assert "has 3 bytes behind its JSON" in str(refusal(text + b"abc", headers))


def test_either_in_the_json_or_behind_it() -> None:
    whole = document(input=tensor(parameters={"binary_data_size": 0}))
    assert "both data and" in str(refusal(whole))


def test_a_size_without_the_header() -> None:
    """The JSON is the whole body then, and nothing follows it."""
    body, _ = binary(b"")
    assert "must be" in str(refusal(body))
    body, _ = binary(elements(A, B))
    assert str(refusal(body, STATED)) == "the body is not valid JSON"


# --- Shapes and types


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "picture"},
        {"name": ["image"]},
        {"name": None},
        {"datatype": "FP32"},
        {"datatype": "bytes"},
        {"datatype": None},
        {"datatype": ["BYTES"]},
        {"shape": None},
        {"shape": 2},
        {"shape": []},
        {"shape": [2, 2]},
        {"shape": [2, 1, 1]},
        {"shape": [-2]},
        {"shape": [2.0]},
        {"shape": [True]},
        {"shape": ["2"]},
        {"shape": [2**31]},
        {"shape": [2, 1, 2, 3]},
        {"shape": [2], "datatype": "UINT8"},
        {"shape": [2, 3, 2, 1], "datatype": "UINT8"},
        {"shape": [1, 2, 3], "datatype": "UINT8"},
        {"shape": [2, 0, 2, 3], "datatype": "UINT8", "data": []},
        {"shape": [1]},
        {"shape": [3]},
        {"data": None},
        {"data": TEXT_A},
        {"data": {"0": TEXT_A}},
        {"data": [[TEXT_A], TEXT_B, TEXT_B]},
        {"data": []},
        {"data": [[]]},
        {"shape": [2, 1, 2, 3], "datatype": "UINT8", "data": [*range(11)]},
        {"shape": [2, 1, 2, 3], "datatype": "UINT8", "data": [*range(245, 257)]},
        {"shape": [2, 1, 2, 3], "datatype": "UINT8", "data": [-1] * 12},
        {"shape": [2, 1, 2, 3], "datatype": "UINT8", "data": [True] * 12},
        {"shape": [2, 1, 2, 3], "datatype": "UINT8", "data": [1.5] * 12},
        {"shape": [2, 1, 2, 3], "datatype": "UINT8", "data": ["1"] * 12},
        {"shape": [2, 1, 2, 3], "datatype": "UINT8", "data": [10**30] * 12},
        {"shape": [2, 1, 2, 3], "datatype": "UINT8", "data": [None] * 12},
        {"parameters": []},
        {"parameters": "x"},
    ],
)
def test_an_input_that_does_not_fit(changes: dict[str, Any]) -> None:
    error = refusal(document(input=tensor(**changes)))
    assert type(error) is MalformedRequest
    assert len(str(error)) < 300


def test_pixels_behind_the_json_must_fit_the_shape() -> None:
    body, headers = binary(bytes(11), shape=[2, 1, 2, 3], datatype="UINT8")
    expected = "input 'image' has 11 bytes, its shape [2, 1, 2, 3] says 12"
    assert str(refusal(body, headers)) == expected


@pytest.mark.parametrize("inputs", [None, [], {}, "image", [3], [tensor(), tensor()], [None]])
def test_there_is_exactly_one_input(inputs: Any) -> None:
    assert "a list of one: 'image'" in str(refusal({"inputs": inputs}))


@pytest.mark.parametrize("shape", [[0], [0, 1]])
def test_no_image(shape: list[int]) -> None:
    assert type(refusal(document(input=tensor(shape=shape, data=[])))) is NoImage
    assert type(refusal(*binary(b"", shape=shape))) is NoImage


@pytest.mark.parametrize(
    "changes", [{}, {"shape": [2, 1, 2, 3], "datatype": "UINT8", "data": NESTED}]
)
def test_too_many_images(changes: dict[str, Any]) -> None:
    whole = document(input=tensor(**changes))
    assert len(read(whole, max_images=2).images) == 2
    assert type(refusal(whole, max_images=1)) is TooManyImages
    whole["inputs"][0]["shape"][0] = 2**31 - 1
    assert type(refusal(whole)) is TooManyImages


# --- What is asked for


def wanted(**more: Any) -> Wanted:
    return read(document(**more)).wanted


def asked(name: Any, **parameters: Any) -> dict[str, Any]:
    return {"name": name, "parameters": parameters}


def test_all_outputs_by_default() -> None:
    """As the specification says of a request that names none."""
    names = ("label", "class_id", "confidence", "probabilities")
    default = Wanted(tuple(map(Output, names)), None)
    assert wanted() == wanted(outputs=[]) == wanted(outputs=None) == default


def test_outputs_in_the_order_asked_for() -> None:
    outputs = [{"name": "probabilities"}, asked("label"), {"name": "class_id", "parameters": None}]
    expected = (Output("probabilities"), Output("label"), Output("class_id"))
    assert wanted(outputs=outputs).outputs == expected


def test_an_outputs_own_word_goes_over_the_requests() -> None:
    outputs = [asked("label", binary_data=False), asked("class_id"), asked("confidence")]
    all_binary = {"binary_data_output": True}
    assert [one.binary for one in wanted(parameters=all_binary).outputs] == [True] * 4
    one_not = wanted(parameters=all_binary, outputs=outputs).outputs
    assert [one.binary for one in one_not] == [False, True, True]
    one_alone = wanted(outputs=[asked("label", binary_data=True), asked("class_id")]).outputs
    assert [one.binary for one in one_alone] == [True, False]


def test_classification() -> None:
    outputs = [asked("probabilities", classification=3, binary_data=True)]
    assert wanted(outputs=outputs).outputs == (Output("probabilities", True, 3),)


@pytest.mark.parametrize("id", ["42", "", "Käfer", "x" * 255])
def test_an_id_is_kept(id: str) -> None:
    assert wanted(id=id).id == id


@pytest.mark.parametrize(
    "more",
    [
        {"id": 42},
        {"id": "x" * 256},
        {"id": "\ud800"},
        {"id": ["42"]},
        {"parameters": []},
        {"parameters": {"binary_data_output": 1}},
        {"parameters": {"binary_data_output": "true"}},
        {"outputs": {}},
        {"outputs": "label"},
        {"outputs": ["label"]},
        {"outputs": [{}]},
        {"outputs": [asked("logits")]},
        {"outputs": [asked(["label"])]},
        {"outputs": [asked("label"), asked("label")]},
        {"outputs": [{"name": "label", "parameters": []}]},
        {"outputs": [asked("label", binary_data="yes")]},
        {"outputs": [asked("label", classification=2)]},
    ],
)
def test_what_nobody_can_ask_for(more: dict[str, Any]) -> None:
    assert type(refusal(document(**more))) is MalformedRequest


@pytest.mark.parametrize("count", [0, -1, 1001, 2.0, "2", True, 10**30])
def test_classification_is_a_number_of_classes(count: Any) -> None:
    error = refusal(document(outputs=[asked("probabilities", classification=count)]))
    assert type(error) is InvalidTopK
    assert str(error) == "classification must be a whole number from 1 to 1000"


def test_top_k() -> None:
    assert read(document(parameters={"top_k": 3}), {"x-top-k": "7"}).top_k == 3
    assert read(document(), {"x-top-k": "7"}).top_k == 7
    assert type(refusal(document(parameters={"top_k": 1001}))) is InvalidTopK


def test_what_clients_send_besides_is_ignored() -> None:
    whole = document(model_name="m", parameters={"priority": 1}, outputs=[asked("label", x=[1])])
    whole["inputs"][0]["parameters"] = {"content_type": "image"}
    assert read(whole).images == [A, B]


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"\xff\xd8\xff", {"image": TEXT_A}, {"instances": [TEXT_A]}]
)
def test_what_is_stated_to_be_v2_must_be(body: Any) -> None:
    assert type(refusal(body, STATED)) is MalformedRequest
    assert protocol_of({"body": body}, STATED) == "v2"


def test_the_header_of_binary_tensors_is_v2s() -> None:
    assert protocol_of({}, {"inference-header-content-length": "x"}) == "v2"
