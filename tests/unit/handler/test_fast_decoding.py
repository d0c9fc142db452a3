"""`decode: fast`: large JPEGs are scaled down by libjpeg itself, and nothing else changes."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from handler.collector import Metrics
from handler.decoders import CpuDecoder, GpuDecoder
from handler.errors import TooManyPixels, UnreadableImage
from handler.image_classifier import ImageClassifier
from handler.images import Picture, decode, open_image, read_picture
from handler.settings import Settings
from tests.drawing import QUARTERS, encode, noise, plain, quarters, turned
from tests.unit.handler.pictures import TRANSFORM, corners, near, outcome, pixels_of
from tests.unit.handler.test_decoders import stand_in
from tests.unit.handler.worker import ask, start

FAST = Settings(decode="fast")
SHORTEST = 2 * TRANSFORM.resize_size  # 464
LARGE = (2 * SHORTEST + 100, 2 * SHORTEST)
JPEG = encode(noise(LARGE), "JPEG")


def difference(data: bytes) -> float:
    """Between both ways on average, in levels of 255."""
    exact, fast = (read_picture(data, TRANSFORM, settings) for settings in (Settings(), FAST))
    assert (exact.decode, fast.decode) == ("exact", "fast")
    assert exact.size == fast.size
    assert exact.pixels.shape == fast.pixels.shape
    return (exact.pixels.float() - fast.pixels.float()).abs().mean().item()


@pytest.mark.parametrize(
    ("short", "scaled"),
    [
        (SHORTEST - 1, 463),
        (2 * SHORTEST - 1, 927),
        (2 * SHORTEST, 464),
        (2 * SHORTEST + 1, 465),
        (3 * SHORTEST, 696),
        (4 * SHORTEST, 464),
        (8 * SHORTEST, 464),
    ],
)
@pytest.mark.parametrize("upright", [True, False])
def test_no_side_becomes_shorter_than_twice_the_resize_size(
    short: int, scaled: int, upright: bool
) -> None:
    size = (short, short + 333) if upright else (short + 333, short)
    data = encode(plain(size=size), "JPEG")
    pixels = decode(open_image(data, FAST), SHORTEST)
    assert min(pixels.shape[:2]) == scaled
    picture = read_picture(data, TRANSFORM, FAST)
    assert picture.size == size
    assert picture.decode == ("exact" if scaled == short else "fast")


@pytest.mark.parametrize("divisor", [2, 4, 8])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}], ids=str)
def test_pixels_are_those_of_pillows_draft(divisor: int, options: dict[str, int]) -> None:
    size = (divisor * 48, divisor * 40)
    data = encode(noise(size), "JPEG", **options)
    with Image.open(BytesIO(data)) as image:
        image.draft(None, (48, 40))
        expected = np.asarray(image)
    assert expected.shape == (40, 48, 3)
    assert (decode(open_image(data, FAST), 40) == expected).all()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_the_image_stays_what_it_is(mode: str) -> None:
    image = quarters(LARGE).convert(mode)
    assert difference(encode(image, "JPEG", quality=95)) < 1
    assert difference(encode(noise(LARGE).convert(mode), "JPEG", quality=95)) < 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_and_size_are_those_of_the_original(orientation: int) -> None:
    picture = read_picture(turned(quarters(LARGE), orientation, "JPEG"), TRANSFORM, FAST)
    assert (picture.size, picture.decode) == (LARGE, "fast")
    image = Image.fromarray(picture.pixels.permute(1, 2, 0).numpy())
    assert all(map(near, corners(image), QUARTERS))


def test_what_libjpeg_does_not_scale_is_decoded_exactly() -> None:
    """Other formats, and JPEGs with an oddity for which only Pillow takes them."""
    start = JPEG.index(b"\xff\xdb")
    odd = JPEG[:start] + b"\0\0\0" + JPEG[start:]
    for data in (encode(noise(LARGE)), encode(noise(LARGE), "BMP"), odd):
        fast = read_picture(data, TRANSFORM, FAST)
        assert fast.decode == "exact"
        assert (fast.pixels == read_picture(data, TRANSFORM, Settings()).pixels).all()


def test_limits_and_damage_are_those_of_the_whole_image() -> None:
    pixels = LARGE[0] * LARGE[1]
    assert isinstance(outcome(JPEG, decode="fast", max_image_pixels=pixels), Picture)
    assert isinstance(outcome(JPEG, decode="fast", max_image_pixels=pixels - 1), TooManyPixels)
    assert isinstance(outcome(JPEG[: len(JPEG) // 2], decode="fast"), UnreadableImage)
    whole = outcome(JPEG[:-2], decode="fast")  # without its end marker, which is no damage
    assert isinstance(whole, Picture)
    assert whole.decode == "fast"


def test_a_gpu_decodes_exactly() -> None:
    decoder = GpuDecoder(TRANSFORM, stand_in, CpuDecoder(TRANSFORM))
    [decoding] = decoder.finish([decoder.start(open_image(JPEG, FAST))])
    assert decoding.picture
    assert decoding.picture.decode == "exact"


def test_each_answer_says_how_its_image_was_decoded(
    model_dir: Path, isolation: list[Metrics]
) -> None:
    small = encode(noise((300, 200)), "JPEG")
    classifier = start(model_dir, decode="fast", cache_bytes=2**20)
    assert classifier.describe_handle()["settings"]["decode"] == "fast"
    large = encode(noise((1100, 1030)), "JPEG")  # the tiny model resizes to 256
    for cached in (False, True):
        replies = ask(classifier, {"body": large}, {"body": small})
        told = [reply.body["metadata"] for reply in replies]
        assert [one["decode"] for one in told] == ["fast", "exact"]
        assert [one["image_size"] for one in told] == [[1100, 1030], [300, 200]]
        assert [one["cached"] for one in told] == [cached, cached]


def test_exact_is_the_default(classifier: ImageClassifier) -> None:
    [reply] = ask(classifier, {"body": JPEG})
    assert reply.body["metadata"]["decode"] == "exact"
    assert pixels_of(JPEG).shape == (LARGE[1], LARGE[0], 3)
