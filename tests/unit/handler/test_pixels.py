"""Images that come as their pixels: the model gets the bytes that it gets of a PNG of them."""

import pytest
import torch
from PIL import Image

from handler.decoders import CpuDecoder, Decoder, GpuDecoder
from handler.errors import ImageTooLarge, TooManyPixels
from handler.images import PixelBudget, open_pixels, read_picture
from handler.pixels import RawPixels
from handler.settings import Settings
from tests.drawing import encode, noise
from tests.unit.handler.pictures import TRANSFORM

CROP, RESIZE = TRANSFORM.crop_size, TRANSFORM.resize_size


def raw_of(image: Image.Image) -> RawPixels:
    return RawPixels(image.tobytes(), image.size)


def refuse(files: list[torch.Tensor]) -> list[torch.Tensor]:
    raise AssertionError("the GPU decodes JPEGs alone")


DECODERS: list[Decoder] = [
    CpuDecoder(TRANSFORM),
    CpuDecoder(TRANSFORM, threads=3),
    GpuDecoder(TRANSFORM, refuse, CpuDecoder(TRANSFORM)),
]


@pytest.mark.parametrize("decoder", DECODERS, ids=["cpu", "threads", "gpu"])
@pytest.mark.parametrize(
    "size",
    [
        (64, 48),
        (501, 375),
        (375, 501),
        (CROP, CROP),
        (RESIZE, RESIZE),
        (RESIZE * 5 // 4, RESIZE * 5 // 4),  # which Pillow resizes
        (1, 1),
        (1, 3000),
        (40_000, 2),
    ],
)
def test_the_same_bytes_as_of_a_png(decoder: Decoder, size: tuple[int, int]) -> None:
    image = noise(size)
    [decoding] = decoder.finish([decoder.start(raw_of(image))])
    expected = read_picture(encode(image), TRANSFORM, Settings())
    assert decoding.error is None
    assert decoding.picture
    assert (decoding.size, decoding.picture.size) == (size, size)
    assert decoding.picture.decode == "exact"
    assert torch.equal(decoding.picture.pixels, expected.pixels)


def test_what_the_client_sent_stays_as_it_is() -> None:
    raw = raw_of(noise((CROP, CROP)))
    before = bytes(bytearray(raw.data))
    [decoding] = (decoder := CpuDecoder(TRANSFORM)).finish([decoder.start(raw)])
    assert decoding.picture
    decoding.picture.pixels.zero_()
    assert raw.data == before


def test_limits() -> None:
    raw = RawPixels(bytes(4 * 5 * 3), (4, 5))
    budget = PixelBudget(20)
    assert open_pixels(raw, Settings(max_image_bytes=60), budget) is raw
    with pytest.raises(TooManyPixels, match="4x5 pixels, the limit for a request is 20, and 0 are"):
        open_pixels(raw, Settings(), budget)
    with pytest.raises(ImageTooLarge, match="60 bytes, the limit is 59"):
        open_pixels(raw, Settings(max_image_bytes=59), PixelBudget(20))
