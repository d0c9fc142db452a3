"""Messages that would take far more memory than they have bytes, and those that do not."""

import pytest

from service.openinference import inference_pb2 as pb
from service.openinference.wire import has_many_fields


def image(count: int = 1, **more: object) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="m", **more)  # type: ignore[arg-type]
    request.inputs.add(name="image", datatype="BYTES", shape=[count])
    return request


def test_images_of_any_size_are_no_matter() -> None:
    raw = image(raw_input_contents=[bytes(10_000_000)])
    typed = image(1000)
    typed.inputs[0].contents.bytes_contents.extend([bytes(1000)] * 1000)
    pixels = image()
    pixels.inputs[0].contents.uint_contents.extend([255] * 100_000)
    for request in (raw, typed, pixels, pb.ModelInferRequest()):
        assert not has_many_fields(request.SerializeToString())


@pytest.mark.parametrize(
    "message",
    [
        b"\x2a\0" * 10_000,  # empty inputs
        b"\x32\0" * 10_000,  # empty outputs
        b"\x22\0" * 10_000,  # empty parameters
        b"\x3a\0" * 10_000,  # raw contents
        b"\x50\1" * 10_000,  # fields that there are not
        b"\x2a\xa0\x9c\1" + b"\x22\0" * 10_000,  # parameters of an input
        b"\x2a\xa4\xce\4\x1a\xa0\xce\4" + bytes(75_552),  # its shape
        b"\x1a\xa0\x8d\6" + bytes(100_000),  # the id
    ],
)
def test_many_fields_are_found(message: bytes) -> None:
    assert has_many_fields(message)


@pytest.mark.parametrize(
    "message", [b"\x2a", b"\x2a\xff", b"\x2a\x05ab", b"\x0b", b"\x0d\0", b"\xff" * 100, b"\x07"]
)
def test_what_is_no_message_is_left_to_the_parser(message: bytes) -> None:
    assert not has_many_fields(message)
