"""Forms as clients send them, as they arrive when they are cut or hostile, and what they cost."""

import base64
import quopri
import timeit
from collections.abc import Callable
from contextlib import suppress
from random import Random
from typing import Any

import pytest
import requests

from handler.errors import InvalidBase64, MalformedRequest, NoImage, RequestError, TooManyImages
from handler.forms import Part, read_boundary, read_form
from handler.payloads import ImageRequest, read_request
from handler.settings import Settings

JPEG = b"\xff\xd8\xff\xe0\r\n--not the boundary\r\n\r\n\n\0 \xff\xd9"
OTHER = b"\x89PNG\r\n\x1a\n nor this"
TYPE = "multipart/form-data; boundary=x"


def part(name: str | None, content: bytes, *headers: str, filename: str | None = None) -> bytes:
    disposition = "Content-Disposition: form-data"
    disposition += "" if name is None else f'; name="{name}"'
    disposition += "" if filename is None else f'; filename="{filename}"'
    return "\r\n".join(["--x", disposition, *headers, "", ""]).encode() + content + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--x--\r\n"


def read(body: bytes, content_type: str = TYPE, max_images: int = 32) -> list[Part]:
    return read_form(body, content_type, max_images)


def request(body: bytes, content_type: str = TYPE, **settings: Any) -> ImageRequest:
    """As the gateway hands it over."""
    headers = {"content-type": "application/octet-stream", "x-body-type": content_type}
    return read_request({"body": bytearray(body)}, headers, 1000, Settings(**settings))


def refusal(call: Callable[..., object], *args: Any, **kwargs: Any) -> RequestError:
    with pytest.raises(RequestError) as raised:
        call(*args, **kwargs)
    return raised.value


# --- What clients send


def test_parts_in_the_order_sent() -> None:
    body = form(part("file", JPEG, filename="a.jpg"), part("top_k", b"3"), part("file", OTHER))
    assert read(body) == [Part("file", JPEG, "a.jpg"), Part("top_k", b"3"), Part("file", OTHER)]
    assert all(type(part.value) is bytes for part in read(body))


def test_python_requests() -> None:
    files = [("file", ("röd.jpg", JPEG, "image/jpeg")), ("file", ("b.png", OTHER))]
    sent = requests.Request("POST", "http://x", files=files, data={"top_k": 2}).prepare()
    assert isinstance(sent.body, bytes)
    answer = request(sent.body, sent.headers["Content-Type"])
    assert (answer.images, answer.top_k) == ([JPEG, OTHER], 2)
    assert answer.filenames == ["röd.jpg", "b.png"]


CURL_LIST = (
    b'--x\r\nContent-Disposition: form-data; name="file"\r\n'
    b"Content-Type: multipart/mixed; boundary=------------------------22904cf87e851b5d\r\n\r\n"
    b"--------------------------22904cf87e851b5d\r\n"
    b'Content-Disposition: attachment; filename="a.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'
    + JPEG
    + b"\r\n--------------------------22904cf87e851b5d\r\n"
    b'Content-Disposition: attachment; filename="b"\r\n\r\n'
    + OTHER
    + b"\r\n--------------------------22904cf87e851b5d--\r\n\r\n"
)


def test_curls_list_of_files_is_a_form_in_a_form() -> None:
    """-F 'file=@a.jpg,b', as curl 7.88 sends it."""
    body = form(CURL_LIST, part("top_k", b"3"))
    files = [Part("file", JPEG, "a.jpg"), Part("file", OTHER, "b")]
    assert read(body) == [*files, Part("top_k", b"3")]


@pytest.mark.parametrize(
    "headers",
    [
        ["Content-Type: image/jpeg; charset=binary"],
        ["Content-Type: image/jpeg;", "\tname=a.jpg"],
        ["Content-Type: image/jpeg; name=a.jpg", "Content-Transfer-Encoding: binary"],
        ["content-transfer-encoding: 8BIT", "CONTENT-TYPE: image/jpeg"],
        ["Content-Transfer-Encoding: 7bit "],
        [f"Content-Length: {len(JPEG)}", "Content-ID: <1>", "MIME-Version: 1.0"],
        ["X-Odd: \xff\xe4"],
    ],
)
def test_headers_of_a_part(headers: list[str]) -> None:
    assert read(form(part("file", JPEG, *headers))) == [Part("file", JPEG)]


@pytest.mark.parametrize(
    ("disposition", "filename"),
    [
        ('form-data; name="file"; filename="a b.jpg"', "a b.jpg"),
        ('Form-Data; NAME="file"; FILENAME="a.jpg"', "a.jpg"),
        ('form-data; filename="a.jpg"; name="file"', "a.jpg"),
        ('form-data; name="file";\r\n filename="a.jpg"', "a.jpg"),
        ('attachment; name="file"; filename="a.jpg"', "a.jpg"),
        ('form-data; name="file"; filename="röd.jpg"', "röd.jpg"),
        ('form-data; name="file"; filename="c%22.jpg"', 'c".jpg'),
        ('form-data; name="file"; filename="c\\".jpg"', 'c".jpg'),
        (r'form-data; name="file"; filename="C:\photos\a.jpg"', "a.jpg"),
        ("form-data; name=file; filename=a.jpg; filename*=utf-8''r%C3%B6d.jpg", "röd.jpg"),
        ("form-data; name=file; filename*=ISO-8859-1'de'r%F6d.jpg", "röd.jpg"),
        ("form-data; name=file; filename*=utf-8''%ff.jpg", "\ufffd.jpg"),
        ("form-data; name=file; filename=a.jpg; filename*=odd''b.jpg", "a.jpg"),
        ('form-data; name="file"; filename=""', None),
        ('form-data; name="file"', None),
    ],
)
def test_file_names(disposition: str, filename: str | None) -> None:
    body = b"--x\r\nContent-Disposition: " + disposition.encode() + b"\r\n\r\n" + JPEG + b"\r\n"
    assert read(form(body)) == [Part("file", JPEG, filename)]


def test_file_name_in_latin_1_costs_nobody_the_request() -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="file"; filename="r\xf6d.jpg"\r\n\r\n'
    assert read(form(body + JPEG + b"\r\n")) == [Part("file", JPEG, "r\ufffdd.jpg")]


def test_part_called_body_is_an_image_or_a_document() -> None:
    assert request(form(part("body", JPEG))).images == [JPEG]
    document = b'{"image": "' + base64.b64encode(JPEG) + b'"}'
    assert request(form(part("body", document))).images == [JPEG]


@pytest.mark.parametrize(
    ("written", "boundary"),
    [
        ("boundary=x", "x"),
        ('boundary="a b:c"', "a b:c"),
        ("Boundary = x", "x"),
        ("charset=utf-8; boundary=x; odd=1", "x"),
        ("boundary=----=_Part_1_12.34", "----=_Part_1_12.34"),
        ("boundary='x'", "'x'"),
        ("boundary=aB", "aB"),
        ("boundary=x ;", "x"),
        ("boundary=", ""),
        ('boundary=""', ""),
        ("boundaries=x", ""),
    ],
)
def test_boundary(written: str, boundary: str) -> None:
    assert read_boundary(f"multipart/form-data; {written}") == boundary
    if boundary:
        body = form(part("file", JPEG)).replace(b"--x", b"--" + boundary.encode())
        assert read(body, f"Multipart/Form-Data;{written}") == [Part("file", JPEG)]


@pytest.mark.parametrize("before", [b"", b"\r\n", b"This is a form.\r\n"])
@pytest.mark.parametrize("after", [b"", b"\r\n", b"\r\nThe end.", b"\r\n--x\r\n"])
def test_preamble_and_epilogue(before: bytes, after: bytes) -> None:
    body = before + form(part("file", JPEG)).removesuffix(b"\r\n") + after
    assert read(body) == [Part("file", JPEG)]


def test_content_type_after_a_tab() -> None:
    """nginx leaves it there."""
    assert request(form(part("file", JPEG)), f"\t{TYPE}").images == [JPEG]


# --- Transfer encodings


@pytest.mark.parametrize("encoding", ["base64", "Base64", "BASE64 "])
@pytest.mark.parametrize("encode", [base64.b64encode, base64.encodebytes])
def test_base64_parts_are_decoded(encoding: str, encode: Callable[[bytes], bytes]) -> None:
    data = bytes(range(256))
    sent = encode(data).replace(b"\n", b"\r\n")
    body = form(part("file", sent, f"Content-Transfer-Encoding: {encoding}", filename="a.jpg"))
    assert read(body) == [Part("file", data, "a.jpg")]


def test_quoted_printable_parts_are_decoded() -> None:
    data = bytes(range(256))
    sent = quopri.encodestring(data)
    body = form(part("file", sent, "Content-Transfer-Encoding: quoted-printable"))
    assert read(body) == [Part("file", data)]


def test_options_may_be_encoded_too() -> None:
    encoded = form(part("file", JPEG), part("top_k", b"Mw==", "Content-Transfer-Encoding: base64"))
    assert request(encoded).top_k == 3
    assert type(refusal(request, encoded.replace(b"Mw==", b"%"))) is InvalidBase64


@pytest.mark.parametrize("name", ["file", "body"])
def test_bad_base64_fails_alone(name: str) -> None:
    bad = part(name, b"%%%", "Content-Transfer-Encoding: base64")
    images = request(form(part("file", JPEG), bad, part("file", OTHER))).images
    assert [images[0], type(images[1]), images[2]] == [JPEG, InvalidBase64, OTHER]
    assert type(request(form(bad)).images[0]) is InvalidBase64


@pytest.mark.parametrize("encoding", ["gzip", "x-uuencode", "base64, gzip", "", "\xff" * 300])
def test_unknown_transfer_encoding_is_refused_by_name(encoding: str) -> None:
    body = form(part("file", JPEG, f"Content-Transfer-Encoding: {encoding}"))
    error = refusal(read, body)
    assert type(error) is MalformedRequest
    assert repr(encoding[:40]) in str(error)
    assert len(str(error)) < 200


# --- File names and options


def test_field_goes_over_own_file_name() -> None:
    body = form(part("file", JPEG, filename="a.jpg"), part("filename", "Käfer".encode()))
    assert request(body).filenames == ["Käfer"]


def test_long_file_name_is_cut() -> None:
    assert request(form(part("file", JPEG, filename="x" * 300))).filenames == ["x" * 255]


def test_option_twice_is_refused_unless_it_says_the_same() -> None:
    body = form(part("top_k", b"3"), part("file", JPEG), part("top_k", b"4"))
    error = refusal(request, body)
    assert type(error) is MalformedRequest
    assert "top_k came twice" in str(error)
    assert request(body.replace(b"\r\n4\r\n", b"\r\n3\r\n")).top_k == 3


# --- What is no form


@pytest.mark.parametrize("end", range(1, len(form(part("file", JPEG))) - 2))
def test_truncated_at_any_byte_is_refused(end: int) -> None:
    error = refusal(request, form(part("file", JPEG))[:end])
    assert type(error) is MalformedRequest
    if end > len(form(part("file", b""))):
        assert "truncated" in str(error)


@pytest.mark.parametrize("content_type", ["multipart/form-data", "multipart/form-data; boundary="])
@pytest.mark.parametrize("gateway", [True, False])
def test_form_without_a_boundary_is_called_that(content_type: str, gateway: bool) -> None:
    """TorchServe itself hands such a form over as it is."""
    headers = {"x-body-type" if gateway else "content-type": content_type}
    row = {"body": bytearray(form(part("file", JPEG)))}
    error = refusal(read_request, row, headers, 1000, Settings())
    assert type(error) is MalformedRequest
    assert "multipart without a boundary" in str(error)


def test_another_boundary_than_the_types_is_called_that() -> None:
    error = refusal(read, form(part("file", JPEG)), "multipart/form-data; boundary=other")
    assert "does not hold the boundary" in str(error)


@pytest.mark.parametrize("gateway", [True, False])
def test_multipart_mixed_needs_no_names(gateway: bool) -> None:
    """As RFC 2046 has it: text may come before the first boundary, and parts may lack a name."""
    nameless = b"--x\r\nContent-Type: image/png\r\n\r\n" + OTHER + b"\r\n"
    body = b"for old readers\r\n" + form(part("image", JPEG), nameless, part("top_k", b"3"))
    headers = {"x-body-type" if gateway else "content-type": "Multipart/Mixed; boundary=x"}
    answer = read_request({"body": bytearray(body)}, headers, 1000, Settings())
    assert (answer.images, answer.top_k) == ([JPEG, OTHER], 3)


@pytest.mark.parametrize("kind", ["related", "alternative", "byteranges", "x" * 300])
def test_other_kinds_of_multipart_are_refused_by_name(kind: str) -> None:
    error = refusal(request, form(part("file", JPEG)), f"multipart/{kind}; boundary=x")
    assert f"multipart/{kind}"[:40] in str(error)
    assert len(str(error)) < 200


@pytest.mark.parametrize(
    "body",
    [
        form(part("file", JPEG)).replace(b"\r\n", b"\n"),
        b"--xx\r\n" + form(part("file", JPEG)),
        b"text--x\r\n" + form(part("file", JPEG)),
        b"--x\r\nno header\r\n\r\n" + JPEG + b"\r\n--x--\r\n",
        b"--x\r\n\xff\xfe: a\r\n\r\n" + JPEG + b"\r\n--x--\r\n",
        b"--x\r\n folded: first\r\n\r\n" + JPEG + b"\r\n--x--\r\n",
        form(part("file", JPEG, "Content-Length: 3")),
        form(part("file", JPEG, "X: " + "x" * 5000)),
        form(part("file", JPEG, *(f"X-{number}: 1" for number in range(20)))),
        form(part("file", b"no inner form", "Content-Type: multipart/mixed; boundary=y")),
        form(part("file", b"no inner form", "Content-Type: multipart/mixed")),
    ],
)
def test_broken_forms_are_refused_with_what_was_expected(body: bytes) -> None:
    error = refusal(read, body)
    assert (type(error), error.status) == (MalformedRequest, 400)
    assert "CR LF" in str(error) or "boundary" in str(error)
    assert "0x" not in str(error)


@pytest.mark.parametrize("header", [None, "Content-Type: image/jpeg"])
def test_part_without_a_name_is_called_that(header: str | None) -> None:
    body = part(None, JPEG) if header is None else f"--x\r\n{header}\r\n\r\n\r\n".encode()
    error = refusal(read, form(body))
    assert type(error) is MalformedRequest
    assert "has no name" in str(error)


@pytest.mark.parametrize("body", [b"", form(part("file", b""))])
def test_nothing_to_classify(body: bytes) -> None:
    assert type(refusal(request, body)) is NoImage


def test_form_without_files() -> None:
    for body in (form(), form(part("top_k", b"3"))):
        error = refusal(request, body)
        assert type(error) is MalformedRequest
        assert "no part named 'file'" in str(error)


def test_damaged_forms_are_read_or_refused() -> None:
    """Whatever else comes out of read_request is a client's 500 and our bug."""
    whole = form(CURL_LIST, part("file", b"QQ==", "Content-Transfer-Encoding: base64"))
    chance = Random(11)
    pieces = b'|\r\n|--x|--|:|"|;|\n|\xff|\0| |=|%'.split(b"|")
    outcomes: set[type] = set()
    for _ in range(3000):
        body = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            start = chance.randrange(len(body))
            body[start : start + chance.choice([0, 1, 2, 30])] = chance.choice(pieces)
        try:
            outcomes.add(type(request(bytes(body))))
        except RequestError as error:
            outcomes.add(type(error))
    assert {ImageRequest, MalformedRequest} <= outcomes


# --- Limits


def test_number_of_images_is_limited() -> None:
    assert len(request(form(*[part("file", JPEG)] * 32)).images) == 32
    for count in (33, 36):  # beside the options there is room for two more parts
        error = refusal(request, form(*[part("file", JPEG)] * count))
        assert (type(error), error.status) == (TooManyImages, 413)
        assert "the limit is 32" in str(error)


def test_nested_parts_count_like_others() -> None:
    error = refusal(read, form(*[CURL_LIST] * 12))
    assert type(error) is TooManyImages


def test_as_many_images_as_can_be_allowed() -> None:
    body = form(*(part("file", JPEG, filename=f"{number:0>200}") for number in range(1024)))
    assert len(request(body, max_images=1024).images) == 1024


def fastest(call: Callable[[], object], times: int) -> float:
    """Seconds of the fastest of some calls: what the machine is busy with else is not counted."""
    return min(timeit.repeat(call, number=1, repeat=times))


def folded(parts: int) -> bytes:
    """Headers that are all continuation lines, the slowest there are."""
    headers = (b"X: y\r\n" + b" x\r\n" * 1000) * 7
    end = b'Content-Disposition: form-data; name="file"\r\n\r\n\r\n'
    return (b"--x\r\n" + headers + end) * parts


HOSTILE = {  # 16 MB of each
    "forms": form(part("file", b"")) * 300_000,
    "parts": (b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\n\r\n') * 300_000,
    "empty parts": b"--x\r\n" * 3_000_000,
    "header": b"--x\r\nX: " + b"x" * 16_000_000,
    "headers": b"--x\r\n" + b"X: y\r\n" * 2_000_000,
    "folded header": b"--x\r\nX: y\r\n" + b" x\r\n" * 4_000_000,
    "folded headers": folded(500),
    "nearly boundaries": b"\r\n--" * 4_000_000,
    "line ends": b"\r\n" * 8_000_000,
    "zeros": bytes(16_000_000),
    "names": b"--x\r\nContent-Disposition: form-data; name=" + b'"; name=' * 2_000_000,
    "nested": form(part("file", CURL_LIST * 30_000, "Content-Type: multipart/mixed; boundary=x")),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_forms_cost_little(kind: str) -> None:
    """They are refused, or read, in tens of milliseconds."""

    def attempt() -> None:
        with suppress(RequestError):
            read(HOSTILE[kind])

    assert fastest(attempt, 3) < 0.25  # an order above what they take, and one below a danger


def test_an_ordinary_form_costs_next_to_nothing() -> None:
    for size, most in ((100_000, 0.002), (6_000_000, 0.05)):
        body = bytearray(form(part("file", bytes(size)), part("top_k", b"3")))
        assert fastest(lambda body=body: read_form(body, TYPE, 32), 20) < most  # type: ignore[misc]
