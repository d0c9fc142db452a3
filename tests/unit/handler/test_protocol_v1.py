"""Bodies of V1 to images: each form of an instance, and each refusal."""

import base64
import json
from typing import Any

import pytest

from handler.errors import (
    ImageTooLarge,
    InvalidBase64,
    InvalidTopK,
    MalformedRequest,
    NoImage,
    RequestError,
    TooManyImages,
)
from handler.payloads import ImageRequest, protocol_of, read_request
from handler.settings import Settings

IMAGE = b"\xff\xd8\xff not really"
TEXT = base64.b64encode(IMAGE).decode()
STATED = {"x-protocol": "v1"}


def read(
    document: Any, headers: dict[str, Any] | None = None, name: str = "body", **settings: Any
) -> ImageRequest:
    return read_request({name: document}, headers or {}, 1000, Settings(**settings))


def refusal(document: Any, headers: dict[str, Any] | None = None, **settings: Any) -> RequestError:
    with pytest.raises(RequestError) as raised:
        read(document, headers, **settings)
    return raised.value


@pytest.mark.parametrize(
    "instance",
    [
        TEXT,
        f"data:image/jpeg;base64,{TEXT}",
        {"b64": TEXT},
        {"image": TEXT},
        {"image": {"b64": TEXT}},
        {"image_bytes": TEXT},
        {"image_bytes": {"b64": TEXT}},
    ],
)
def test_each_form_of_an_instance(instance: Any) -> None:
    assert read({"instances": [instance, TEXT]}) == ImageRequest(
        images=[IMAGE, IMAGE], wants_list=True, top_k=5, filenames=[None, None], protocol="v1"
    )


@pytest.mark.parametrize("name", ["body", "data"])
@pytest.mark.parametrize("headers", [{}, STATED, {"content-type": "application/json"}])
@pytest.mark.parametrize("form", ["parsed", "bytes", "bytearray", "text"])
def test_the_body_as_torchserve_may_hand_it_over(
    form: str, headers: dict[str, Any], name: str
) -> None:
    """ "data" is what TorchServe's own gRPC clients call it."""
    document = {"instances": [TEXT], "parameters": {"top_k": 3}}
    text = json.dumps(document)
    forms = {"parsed": document, "text": text}
    body = forms.get(form, bytearray(text.encode()) if form == "bytearray" else text.encode())
    request = read(body, headers, name)
    assert (request.images, request.top_k, request.protocol) == ([IMAGE], 3, "v1")


def test_the_stated_protocol_needs_no_type() -> None:
    """Whatever a client calls the body on a route of V1, it is JSON, and no form is taken apart."""
    headers = STATED | {"x-body-type": "multipart/form-data; boundary=x"}
    assert read(b' {"instances": ["QQ=="]}', headers).images == [b"A"]


def test_the_nearest_top_k_counts() -> None:
    row = {"top_k": b"4", "body": {"instances": [TEXT]}}
    nearer = {"top_k": b"4", "body": {"instances": [TEXT], "parameters": {"top_k": 2}}}
    header = {"x-top-k": "7"}
    assert read_request(row, header, 1000, Settings()).top_k == 4
    assert read_request(nearer, header, 1000, Settings()).top_k == 2
    assert read({"instances": [TEXT]}, header).top_k == 7
    assert read({"instances": [TEXT], "parameters": {}}).top_k == 5


def test_what_clients_send_besides_is_ignored() -> None:
    document = {"signature_name": "serving_default", "instances": [TEXT], "parameters": {"x": 1}}
    assert read(document).images == [IMAGE]


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ("%%%", InvalidBase64),
        ("https://example.org/a.jpg", InvalidBase64),
        ({"b64": "%%%"}, InvalidBase64),
        (3, MalformedRequest),
        (None, MalformedRequest),
        ([TEXT], MalformedRequest),
        ({}, MalformedRequest),
        ({"b64": 3}, MalformedRequest),
        ({"b64": {"b64": TEXT}}, MalformedRequest),
        ({"image": {"image": TEXT}}, MalformedRequest),
        ({"picture": TEXT}, MalformedRequest),
        ({"b64": TEXT, "image": TEXT}, MalformedRequest),
        (base64.b64encode(bytes(1010)).decode(), ImageTooLarge),
    ],
)
def test_a_bad_instance_is_known_by_its_place(bad: Any, error: type[RequestError]) -> None:
    request = read({"instances": [TEXT, bad]}, max_image_bytes=1000)
    assert request.images[0] == IMAGE
    assert type(request.images[1]) is error


@pytest.mark.parametrize(
    ("document", "error"),
    [
        ({"instances": []}, NoImage),
        ({"instances": TEXT}, MalformedRequest),
        ({"instances": {"b64": TEXT}}, MalformedRequest),
        ({"instances": None}, MalformedRequest),
        ({"instances": [TEXT] * 4}, TooManyImages),
        ({"instances": [TEXT], "parameters": []}, MalformedRequest),
        ({"instances": [TEXT], "parameters": {"top_k": 0}}, InvalidTopK),
        ({"instances": [TEXT], "parameters": {"top_k": 1001}}, InvalidTopK),
        ({"instances": [TEXT], "parameters": {"top_k": 2.0}}, InvalidTopK),
    ],
)
def test_refused_as_a_whole(document: Any, error: type[RequestError]) -> None:
    assert type(refusal(document, max_images=3)) is error


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"QQ=="', b"\xff\xd8\xff", {"image": TEXT}, {"inputs": []}, [TEXT]]
)
def test_what_is_stated_to_be_v1_must_be(body: Any) -> None:
    assert type(refusal(body, STATED)) is MalformedRequest
    assert protocol_of({"body": body}, STATED) == "v1"


@pytest.mark.parametrize("row", [{}, {"file": IMAGE}, {"body": b"{}", "file": IMAGE}])
def test_a_form_is_no_request_of_v1(row: dict[str, Any]) -> None:
    with pytest.raises(MalformedRequest, match="a request of V1 is one JSON document"):
        read_request(row, STATED, 1000, Settings())


@pytest.mark.parametrize("stated", ["", "v3", "V1", {"content-type": "text/plain"}])
def test_no_other_protocol_can_be_stated(stated: Any) -> None:
    assert read(IMAGE, {"x-protocol": stated}).protocol == "own"


@pytest.mark.parametrize(
    ("row", "protocol"),
    [
        ({"body": {"instances": []}}, "v1"),
        ({"body": b'{"instances": []}'}, "v1"),
        ({"data": bytearray(b'{"instances": []}')}, "v1"),
        ({"body": {"inputs": []}}, "v2"),
        ({"body": '{"inputs": []}'}, "v2"),
        ({"body": {"image": "%"}}, "own"),
        ({"body": b'{"instances": ['}, "own"),
        ({"body": IMAGE}, "own"),
        ({"file": b'{"instances": []}'}, "own"),
        ({}, "own"),
    ],
)
def test_the_protocol_of_what_was_refused(row: dict[str, Any], protocol: str) -> None:
    assert protocol_of(row, {}) == protocol
