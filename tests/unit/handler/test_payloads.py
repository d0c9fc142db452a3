"""Every form of a request's body to images and options, and every way to get it wrong."""

import base64
import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import pytest

from handler.errors import InvalidBase64, InvalidTopK, MalformedRequest, NoImage, RequestError
from handler.payloads import ImageRequest, read_request
from handler.settings import Settings

JPEG = b"\xff\xd8\xff\xe0 not really \xff\xd9"  # what the bytes hold is not this module's business
OTHER = b"\x89PNG nor this"
JSON = {"content-type": "application/json"}
MULTIPART = {"content-type": "multipart/form-data; boundary=x"}
FORM = {"content-type": "application/x-www-form-urlencoded"}


def read(
    row: Mapping[str, Any],
    headers: Mapping[str, Any] | None = None,
    classes: int = 1000,
    **settings: Any,
) -> ImageRequest:
    return read_request(row, headers or {}, classes, Settings(**settings))


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def refusal(row: Mapping[str, Any], *args: Any, **kwargs: Any) -> RequestError:
    with pytest.raises(RequestError) as raised:
        read(row, *args, **kwargs)
    return raised.value


# --- The image as the body


@pytest.mark.parametrize("kind", [bytes, bytearray])
@pytest.mark.parametrize(
    "headers", [{}, {"content-type": "image/jpeg"}, {"content-type": "application/octet-stream"}]
)
def test_raw_body(kind: type, headers: dict[str, str]) -> None:
    request = read({"body": kind(JPEG)}, headers)
    assert request == ImageRequest(images=[JPEG], wants_list=False, top_k=5, filenames=[None])
    assert type(request.images[0]) is bytes


def test_text_body_is_taken_as_its_bytes() -> None:
    """TorchServe decodes text/*: an SVG then gets the answer that names it."""
    assert read({"body": "<svg>é</svg>"}).images == ["<svg>é</svg>".encode()]


def test_raw_body_with_a_query() -> None:
    request = read({"top_k": bytearray(b"3"), "body": bytearray(JPEG)})
    assert (request.images, request.top_k) == ([JPEG], 3)


# --- Multipart


@pytest.mark.parametrize("part", ["file", "image", "data", "body", "file1", "image7", "body12"])
def test_part_of_any_known_name(part: str) -> None:
    request = read({part: bytearray(JPEG)}, MULTIPART)
    assert (request.images, request.wants_list) == ([JPEG], False)


@pytest.mark.parametrize("parts", [("file1", "file2"), ("image", "file"), ("file2", "file1")])
def test_several_parts_stay_in_the_order_sent(parts: tuple[str, str]) -> None:
    request = read(dict(zip(parts, (JPEG, OTHER), strict=True)), MULTIPART)
    assert (request.images, request.wants_list) == ([JPEG, OTHER], True)


def test_options_beside_a_part() -> None:
    row = {"top_k": bytearray(b"2"), "file": JPEG, "filename": bytearray("Käfer.jpg".encode())}
    assert read(row, MULTIPART) == ImageRequest(
        images=[JPEG], wants_list=False, top_k=2, filenames=["Käfer.jpg"]
    )


def test_options_that_torchserve_has_parsed() -> None:
    """A part of type application/json or text/plain arrives as what it says."""
    assert read({"file": JPEG, "top_k": 4, "filename": "a.png"}).top_k == 4


def test_options_alone_make_no_request() -> None:
    assert type(refusal({"top_k": b"3"})) is NoImage


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"file1": JPEG, "file2": OTHER, "filename": b"a.jpg"}, "filename goes with one image"),
        ({"body": {"images": ["QQ=="], "filename": "a.jpg"}}, "filename goes with 'image'"),
    ],
)
def test_filename_goes_with_one_image(row: dict[str, Any], message: str) -> None:
    error = refusal(row)
    assert type(error) is MalformedRequest
    assert message in str(error)


@pytest.mark.parametrize("name", ["photo", "File", "file_1", "fileX", "topk", "files", ""])
def test_unknown_part_is_refused_by_name(name: str) -> None:
    error = refusal({"file": JPEG, name: b"1"}, MULTIPART)
    assert type(error) is MalformedRequest
    assert repr(name) in str(error)


def test_long_unknown_names_are_cut() -> None:
    assert len(str(refusal({"file": JPEG, "x" * 10_000: b"1"}))) < 200


# --- JSON


@pytest.mark.parametrize("form", ["parsed", "bytes", "bytearray", "text"])
@pytest.mark.parametrize("headers", [{}, JSON, {"content-type": "application/json; charset=utf-8"}])
def test_json_in_any_form(form: str, headers: dict[str, str]) -> None:
    document = {"image": b64(JPEG), "top_k": 3, "filename": "a.jpg"}
    text = json.dumps(document)
    body = {
        "parsed": document,
        "bytes": text.encode(),
        "bytearray": bytearray(text.encode()),
        "text": text,
    }[form]
    assert read({"body": body}, headers) == ImageRequest(
        images=[JPEG], wants_list=False, top_k=3, filenames=["a.jpg"]
    )


def test_json_after_blanks() -> None:
    body = b" \r\n\t" + json.dumps({"image": b64(JPEG)}).encode()
    assert read({"body": body}).images == [JPEG]


def test_data_url() -> None:
    url = f"data:image/jpeg;base64,{b64(JPEG)}"
    assert read({"body": {"image": url}}).images == [JPEG]


@pytest.mark.parametrize("url", ["data:image/png,abc", "data:;base6,QQ==", "data:", "data:QQ=="])
def test_data_url_without_base64_is_refused(url: str) -> None:
    assert type(refusal({"body": {"image": url}})) is InvalidBase64


@pytest.mark.parametrize("count", [1, 3])
def test_json_list_is_several_whatever_its_length(count: int) -> None:
    request = read({"body": {"images": [b64(JPEG)] * count}})
    assert (request.images, request.wants_list) == ([JPEG] * count, True)


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ("%%%", InvalidBase64),
        (3, MalformedRequest),
        (None, MalformedRequest),
        ({"b64": "QQ=="}, MalformedRequest),
        ("https://example.org/a.jpg", InvalidBase64),
    ],
)
def test_bad_image_in_a_list_fails_alone(bad: Any, error: type[RequestError]) -> None:
    request = read({"body": {"images": [b64(JPEG), bad, b64(OTHER)]}})
    assert request.images[0] == JPEG
    assert type(request.images[1]) is error
    assert request.images[2] == OTHER


def test_document_goes_over_query() -> None:
    assert read({"top_k": b"3", "body": {"image": b64(JPEG)}}).top_k == 3
    assert read({"top_k": b"3", "body": {"image": b64(JPEG), "top_k": 2}}).top_k == 2


@pytest.mark.parametrize("body", [b"{", b'{"image": }', b'{"image": "QQ=="} x', b'{"a": NaN}'])
@pytest.mark.parametrize("headers", [{}, JSON])
def test_broken_json_is_refused(body: bytes, headers: dict[str, str]) -> None:
    error = refusal({"body": body}, headers)
    assert (type(error), str(error)) == (MalformedRequest, "the body is not valid JSON")


@pytest.mark.parametrize("body", [b"not json", b"", b"\xff\xd8\xff"])
def test_what_is_called_json_and_is_not_is_refused(body: bytes) -> None:
    assert type(refusal({"body": body}, JSON)) is MalformedRequest


@pytest.mark.parametrize("body", [[], ["QQ=="], b'["QQ=="]', b'"QQ=="', b"3", b"null"])
def test_json_must_be_an_object(body: Any) -> None:
    assert type(refusal({"body": body}, JSON)) is MalformedRequest


@pytest.mark.parametrize("value", ["QQ==", {"0": "QQ=="}, 3, None])
def test_images_must_be_a_list(value: Any) -> None:
    assert type(refusal({"body": {"images": value}})) is MalformedRequest


@pytest.mark.parametrize(
    "document", [{}, {"top_k": 3}, {"images": []}, {"image": "QQ==", "images": ["QQ=="]}]
)
def test_json_needs_image_or_images(document: dict[str, Any]) -> None:
    assert type(refusal({"body": document})) is NoImage


@pytest.mark.parametrize("name", ["topk", "Image", "url", ""])
def test_unknown_field_is_refused_by_name(name: str) -> None:
    error = refusal({"body": {"image": b64(JPEG), name: 1}})
    assert type(error) is MalformedRequest
    assert repr(name) in str(error)


@pytest.mark.parametrize("filename", [3, ["a"], {"a": 1}, True, "x" * 256])
def test_filename_must_be_short_text(filename: Any) -> None:
    error = refusal({"body": {"image": b64(JPEG), "filename": filename}})
    assert type(error) is MalformedRequest
    assert "at most 255 characters" in str(error)


def test_longest_filename() -> None:
    assert read({"file": JPEG, "filename": b"x" * 255}).filenames == ["x" * 255]


def test_filename_is_kept_as_sent() -> None:
    """It is only ever repeated in the answer, never opened."""
    name = "../../etc/passwd\n\u2028"
    assert read({"body": {"image": b64(JPEG), "filename": name}}).filenames == [name]


def test_filename_that_no_answer_could_repeat_is_refused() -> None:
    """Half of a surrogate pair: Python's json takes it, and no encoder to UTF-8 does."""
    body = json.loads('{"image": "QQ==", "filename": "\\ud800"}')
    assert type(refusal({"body": body})) is MalformedRequest


# --- Base64


@pytest.mark.parametrize("length", range(1, 9))
def test_base64_of_any_length(length: int) -> None:
    assert read({"body": {"image": b64(JPEG[:length])}}).images == [JPEG[:length]]


def test_base64_in_lines() -> None:
    data = bytes(range(256))
    text = base64.encodebytes(data).decode()  # a line break after each 76 characters
    assert "\n" in text
    assert read({"body": {"image": text.replace("\n", "\r\n") + " \t"}}).images == [data]


@pytest.mark.parametrize("text", ["Q", "QQ", "QQ=", "QQ==QQ==", "Q-_=", "QQ==!", "ÄÄÄÄ", "QQ\0=="])
def test_bad_base64_is_refused(text: str) -> None:
    error = refusal({"body": {"image": text}})
    assert (type(error), str(error)) == (InvalidBase64, "the image is not valid base64")


@pytest.mark.parametrize("scheme", ["http", "https", "HTTPS", "ftp", "file", "s3", "gs"])
def test_url_is_refused_and_not_fetched(scheme: str) -> None:
    error = refusal({"body": {"image": f"{scheme}://127.0.0.1:9/a.jpg"}})
    assert type(error) is InvalidBase64
    assert "URLs are not fetched" in str(error)


@pytest.mark.parametrize("length", [10, 11, 12, 13])
@pytest.mark.parametrize("lines", [False, True])
def test_largest_image_is_taken(length: int, lines: bool) -> None:
    data = bytes(length * 100)
    text = base64.encodebytes(data).decode() if lines else b64(data)
    request = read({"body": {"image": text}}, max_image_bytes=len(data))
    assert request.images == [data]


def test_too_long_base64_is_refused_before_decoding() -> None:
    error = refusal({"body": {"image": b64(bytes(104))}}, max_image_bytes=100)
    assert error.status == 413
    assert str(error) == "the image has about 105 bytes, the limit is 100"


# --- top_k


@pytest.mark.parametrize("value", [1, 999, 1000, "1", " 7 ", "1000", "007"])
def test_valid_top_k(value: Any) -> None:
    assert read({"body": {"image": "QQ==", "top_k": value}}).top_k == int(value)
    if isinstance(value, str):
        assert read({"file": JPEG, "top_k": value.encode()}).top_k == int(value)
        assert read({"body": JPEG}, {"x-top-k": value}).top_k == int(value)


BAD_TOP_K = ["0", "1001", "-1", "3.0", "1e1", "", "x", "½", "٣", "9" * 5000, "3 4"]


@pytest.mark.parametrize("value", [0, -1, 1001, 3.0, True, [3], {"k": 3}, 10**30, *BAD_TOP_K])
def test_bad_top_k_in_json(value: Any) -> None:
    error = refusal({"body": {"image": "QQ==", "top_k": value}})
    assert (type(error), error.status) == (InvalidTopK, 400)
    assert str(error) == "top_k must be a whole number from 1 to 1000"


@pytest.mark.parametrize("value", BAD_TOP_K)
def test_bad_top_k_in_a_part_or_header(value: str) -> None:
    assert type(refusal({"file": JPEG, "top_k": value.encode()}, MULTIPART)) is InvalidTopK
    assert type(refusal({"body": JPEG}, {"x-top-k": value})) is InvalidTopK


@pytest.mark.parametrize("blank", ["\x1c", "\x1d", "\x1e", "\x1f", "\x85", "\xa0", "\u2003"])
def test_any_blank_around_top_k_is_left_out(blank: str) -> None:
    """int() itself takes only some of those that a regular expression does."""
    assert read({"body": JPEG}, {"x-top-k": f"3{blank}"}).top_k == 3


def test_undecodable_top_k_is_refused() -> None:
    assert type(refusal({"file": JPEG, "top_k": b"\xff\xfe3"})) is InvalidTopK


def test_field_goes_over_header_over_setting() -> None:
    header = {"x-top-k": "4"}
    assert read({"file": JPEG, "top_k": b"3"}, header, top_k=2).top_k == 3
    assert read({"body": {"image": "QQ==", "top_k": 3}}, header, top_k=2).top_k == 3
    assert read({"body": JPEG}, header, top_k=2).top_k == 4
    assert read({"body": {"image": "QQ==", "top_k": None}}, header, top_k=2).top_k == 4
    assert read({"body": JPEG}, top_k=2).top_k == 2


@pytest.mark.parametrize(("classes", "top_k"), [(3, 3), (5, 5), (1000, 5)])
def test_setting_is_capped_at_the_number_of_classes(classes: int, top_k: int) -> None:
    assert read({"body": JPEG}, classes=classes).top_k == top_k


# --- Limits and odd rows


@pytest.mark.parametrize(
    "row", [{f"file{index}": JPEG for index in range(4)}, {"body": {"images": [b64(JPEG)] * 4}}]
)
def test_number_of_images_is_limited(row: dict[str, Any]) -> None:
    assert len(read(row, max_images=4).images) == 4
    error = refusal(row, max_images=3)
    assert error.status == 413
    assert str(error) == "the request has 4 images, the limit is 3"


@pytest.mark.parametrize("headers", [{}, {"content-type": "image/jpeg"}])
@pytest.mark.parametrize("row", [{}, {"body": b""}, {"body": bytearray()}, {"file": b""}])
def test_nothing_to_classify(row: dict[str, Any], headers: dict[str, str]) -> None:
    error = refusal(row, headers)
    assert (type(error), error.status) == (NoImage, 400)


def test_empty_row_of_a_multipart_body_was_a_broken_one() -> None:
    error = refusal({}, MULTIPART)
    assert (type(error), error.status) == (MalformedRequest, 400)
    assert "multipart" in str(error)


@pytest.mark.parametrize("row", [{}, {"body": JPEG}, {"\xff\xd8garbage": b""}])
def test_web_form_gets_advice(row: dict[str, Any]) -> None:
    """curl --data-binary @FILE without a content type."""
    error = refusal(row, FORM)
    assert (type(error), error.status) == (MalformedRequest, 400)
    assert "curl" in str(error)


def test_json_sent_as_a_web_form_is_read_all_the_same() -> None:
    """curl -d '{…}' without a content type: TorchServe hands the body over as it is."""
    body = json.dumps({"image": b64(JPEG)}).encode()
    assert read({"body": body}, FORM).images == [JPEG]


ODD_VALUES: list[Any] = [None, True, 3, 2.5, 10**30, float("nan"), [], [[]]]
ODD_VALUES += ["", "{", "\ud800", b"\xff", b"{"]
ODD_VALUES += [{}, {"image": {}}, {"images": [{}]}, {"image": "QQ==", "top_k": {}}]


@pytest.mark.parametrize("value", ODD_VALUES, ids=repr)
def test_odd_rows_are_read_or_refused(value: Any) -> None:
    """Whatever else comes out of read_request is a client's 500 and our bug."""
    rows: list[dict[str, Any]] = [{"body": value}, {"file": value}]
    rows += [{"file": JPEG, name: value} for name in ("top_k", "filename", "odd")]
    for headers in ({}, JSON, MULTIPART, FORM, {"content-type": {"content-type": "text/plain"}}):
        for row in rows:
            with suppress(InvalidBase64, InvalidTopK, MalformedRequest, NoImage):
                assert read(row, headers).images


# --- What a cached result must have


@pytest.mark.parametrize(
    ("outputs", "classes"),
    [
        (None, 1000),
        ([{"name": "probabilities"}], 1000),
        ([{"name": "label"}, {"name": "confidence"}], 3),
        ([{"name": "probabilities", "parameters": {"classification": 7}}], 7),
        ([{"name": "probabilities", "parameters": {"classification": 2}}], 3),
    ],
)
def test_v2_needs_all_classes_for_the_tensor_of_probabilities(
    outputs: list[Any] | None, classes: int
) -> None:
    image = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [b64(JPEG)]}
    body = {"inputs": [image], "parameters": {"top_k": 3}, "outputs": outputs}
    assert read({"body": json.dumps(body).encode()}, JSON).classes_of(1000) == classes


def test_other_requests_need_as_many_classes_as_they_ask_for() -> None:
    assert read({"body": JPEG}).classes_of(1000) == 5
    instances = {"instances": [{"b64": b64(JPEG)}], "parameters": {"top_k": 2}}
    assert read({"body": json.dumps(instances).encode()}, JSON).classes_of(1000) == 2
