"""Decoders: what each gives, whatever else is in the batch.

nvJPEG needs a GPU. In its place stands torchvision's decoder for the CPU, which is called the same
way, so that all that is around it is tested everywhere. nvImageCodec decodes on the CPU as well.
"""

import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import functional as F  # noqa: N812

import handler.decoders
from handler.batch_resize import Turned, resize_and_crop_batch
from handler.decoders import (
    ALL_SAMPLINGS,
    CpuDecoder,
    DecodeJpegs,
    Decoder,
    Decoding,
    GpuDecoder,
    choose_decoder,
    plain_sampling,
)
from handler.errors import InvalidSettings, UnreadableImage
from handler.images import Picture, open_image, read_picture
from handler.networks import input_transform
from handler.nvimgcodec import nvimgcodec
from handler.settings import Settings
from tests.drawing import RED, encode, noise, plain, quarters, turned
from tests.unit.tiny import RECIPE

TRANSFORM = input_transform(RECIPE)
JPEG = encode(noise((501, 343)), "JPEG")
PLAIN = {
    "4:2:0": JPEG,
    "4:2:2": encode(noise((501, 343)), "JPEG", subsampling=1),
    "4:4:4": encode(noise((501, 343)), "JPEG", subsampling=0),
    "progressive": encode(noise((501, 343)), "JPEG", progressive=True),
    "grayish": encode(plain((90, 90, 90), (501, 343)), "JPEG"),
    "upright": turned(noise((501, 343)), 6, "JPEG"),
}


OTHER = {
    "PNG": encode(noise((501, 343))),
    "grey": encode(noise((501, 343)).convert("L"), "JPEG"),
    "CMYK": encode(noise((501, 343)).convert("CMYK"), "JPEG"),
    "RGB, by the Adobe marker": encode(noise((501, 343)), "JPEG", keep_rgb=True),
    "MPO": encode(noise((501, 343)), "MPO", save_all=True, append_images=[noise((501, 343), 1)]),
    "cut short": JPEG[:-100],
    "something after its end": JPEG + b"\0",
}
SOUND = [data for data in (*PLAIN.values(), *OTHER.values()) if data != OTHER["cut short"]]


def stand_in(images: list[Tensor]) -> list[Tensor]:
    """libjpeg, called like nvJPEG."""
    return decode_jpeg(images, mode=ImageReadMode.RGB)


def nothing(images: list[Tensor]) -> list[Tensor]:
    raise RuntimeError("nvJPEG is broken")


def on_gpu(decode_jpegs: DecodeJpegs = stand_in, threads: int = 1) -> GpuDecoder:
    return GpuDecoder(TRANSFORM, decode_jpegs, CpuDecoder(TRANSFORM, threads))


def run(decoder: Decoder, images: Sequence[bytes]) -> list[Decoding]:
    """Decode, in the order of the images."""
    started = [decoder.start(open_image(data, Settings())) for data in images]
    finished = list(decoder.finish(started))
    assert sorted(map(id, finished)) == sorted(map(id, started))
    return started


def off(given: Picture | None, data: bytes) -> float:
    """Mean difference to the CPU's path, in levels of 255."""
    assert given is not None
    expected = read_picture(data, TRANSFORM, Settings())
    assert given.size == expected.size
    assert (given.pixels.shape, given.pixels.dtype) == (expected.pixels.shape, torch.uint8)
    return (given.pixels.cpu().float() - expected.pixels.float()).abs().mean().item()


class Counting:
    """Counts the images of each call."""

    def __init__(self, decode_jpegs: DecodeJpegs = stand_in) -> None:
        self.calls: list[int] = []
        self._decode_jpegs = decode_jpegs

    def __call__(self, images: list[Tensor]) -> Sequence[Tensor | None]:
        self.calls.append(len(images))
        return self._decode_jpegs(images)


# --- CPU


@pytest.mark.parametrize("threads", [1, 3])
def test_cpu_gives_what_reading_gives(threads: int) -> None:
    for decoding, data in zip(run(CpuDecoder(TRANSFORM, threads), SOUND), SOUND, strict=True):
        assert off(decoding.picture, data) == 0
        assert decoding.error is None


@pytest.mark.parametrize("threads", [1, 3])
def test_a_damaged_image_harms_no_other(threads: int) -> None:
    good, bad, other = run(CpuDecoder(TRANSFORM, threads), [JPEG, JPEG[:-3000], OTHER["PNG"]])
    assert isinstance(bad.error, UnreadableImage)
    assert bad.picture is None
    assert (good.error, other.error) == (None, None)
    assert good.picture
    assert other.picture


def test_an_error_holds_no_image() -> None:
    """By the frames that it came through, until the collector happens to run."""
    [bad] = run(CpuDecoder(TRANSFORM), [JPEG[:-3000]])
    assert bad.error
    assert bad.error.__traceback__ is None


def test_one_thread_decodes_at_once_and_has_no_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(handler.decoders, "ThreadPoolExecutor")
    decoding = CpuDecoder(TRANSFORM, threads=1).start(open_image(JPEG, Settings()))
    assert decoding.picture


def test_several_threads_decode_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits until the other has begun; and takes one thread of torch's, leaving ours."""
    both = threading.Barrier(2, timeout=30)
    seen = []

    def decode(*_: object) -> Picture:
        both.wait()
        seen.append((threading.current_thread(), torch.get_num_threads()))
        return Picture(torch.zeros(3, 224, 224, dtype=torch.uint8), (1, 1))

    monkeypatch.setattr(handler.decoders, "decode_picture", decode)
    torch.set_num_threads(2)
    run(CpuDecoder(TRANSFORM, threads=2), [JPEG, OTHER["PNG"]])
    threads, of_torch = zip(*seen, strict=True)
    assert len(set(threads)) == 2
    assert threading.current_thread() not in threads
    assert of_torch == (1, 1)
    assert torch.get_num_threads() == 2


# --- GPU


@pytest.mark.parametrize("name", PLAIN)
def test_plain_jpegs_go_to_the_gpu(name: str) -> None:
    decode = Counting()
    [decoding] = run(on_gpu(decode), [PLAIN[name]])
    assert decode.calls == [1]
    assert off(decoding.picture, PLAIN[name]) < 0.01


@pytest.mark.parametrize("name", OTHER)
def test_other_images_go_to_the_cpu(name: str) -> None:
    decode = Counting()
    [decoding] = run(on_gpu(decode), [OTHER[name]])
    assert decode.calls == []
    if name == "cut short":
        assert isinstance(decoding.error, UnreadableImage)
    else:
        assert off(decoding.picture, OTHER[name]) == 0


@pytest.mark.parametrize("short", [16, 64, 320, 448])  # in the last two, many values are ties
def test_small_and_uneven_sizes_are_as_pillow_resizes_them(short: int) -> None:
    image = noise((500, short))
    data = encode(image, "JPEG")
    decode = Counting()
    [decoding] = run(on_gpu(decode), [data])
    assert decode.calls == [1]
    resized = F.resize(Image.open(BytesIO(data)), [TRANSFORM.resize_size], antialias=True)
    expected = F.pil_to_tensor(F.center_crop(resized, [TRANSFORM.crop_size]))
    assert decoding.picture
    assert torch.equal(decoding.picture.pixels, expected)


@pytest.mark.parametrize("name", ["4:4:4", "4:2:2", "4:2:0"])
def test_only_the_samplings_that_it_is_for_go_to_the_gpu(name: str) -> None:
    decode = Counting()
    decoder = on_gpu(decode)
    decoder.samplings = (name,)
    images = [PLAIN["4:4:4"], PLAIN["4:2:2"], PLAIN["4:2:0"], OTHER["PNG"]]
    for decoding, data in zip(run(decoder, images), images, strict=True):
        assert off(decoding.picture, data) < 0.01
    assert decode.calls == [1]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation: int) -> None:
    data = turned(quarters((480, 340)), orientation, "JPEG", quality=95)
    [decoding] = run(on_gpu(), [data])
    assert decoding.picture
    assert decoding.picture.size == (480, 340)
    assert off(decoding.picture, data) < 0.01


@pytest.mark.parametrize("threads", [1, 3])
def test_every_image_of_a_batch_gets_its_own_pixels(threads: int) -> None:
    images = [*SOUND, encode(noise((600, 330), seed=2), "JPEG")] * 2
    for decoding, data in zip(run(on_gpu(threads=threads), images), images, strict=True):
        assert off(decoding.picture, data) < 0.01


def test_images_of_like_sizes_are_rows_of_one_tensor() -> None:
    wide, high = encode(noise((501, 343)), "JPEG"), encode(noise((343, 501)), "JPEG")
    images = [wide, high, encode(noise((400, 400)), "JPEG"), turned(noise((501, 343)), 6, "JPEG")]
    decode = Counting()
    rows = []
    for decoding, data in zip(run(on_gpu(decode), images), images, strict=True):
        assert off(decoding.picture, data) < 0.01
        assert decoding.picture
        assert decoding.picture.pixels.is_contiguous()
        rows.append(decoding.picture.pixels)
    assert decode.calls == [4]
    assert len({row.untyped_storage().data_ptr() for row in rows}) == 1
    step = 3 * TRANSFORM.crop_size**2
    assert sorted(row.storage_offset() for row in rows) == [0, step, 2 * step, 3 * step]


def test_the_body_is_not_copied() -> None:
    def decode(images: list[Tensor]) -> list[Tensor]:
        seen.extend(image.data_ptr() for image in images)
        return stand_in(images)

    seen: list[int] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(on_gpu(decode), [JPEG])
    assert seen == [np.frombuffer(JPEG, np.uint8).ctypes.data]


def refusing(jpeg: bytes) -> DecodeJpegs:
    def decode(images: list[Tensor]) -> list[Tensor]:
        if any(bytes(image.numpy()) == jpeg for image in images):
            raise RuntimeError("Error while decoding JPEG images: 4")
        return stand_in(images)

    return decode


def test_one_refused_image_does_not_cost_the_others_the_gpu() -> None:
    decode = Counting(refusing(PLAIN["4:4:4"]))
    images = [JPEG, PLAIN["4:4:4"], PLAIN["progressive"]]
    for decoding, data in zip(run(on_gpu(decode), images), images, strict=True):
        assert off(decoding.picture, data) < 0.01
    assert decode.calls == [3, 1, 1, 1]


def test_an_image_refused_inside_a_batch_is_refused_alone() -> None:
    def decode(images: list[Tensor]) -> list[Tensor | None]:
        calls.append(len(images))
        refused = [bytes(image.numpy()) == PLAIN["4:4:4"] for image in images]
        decoded = stand_in(images)
        return [None if no else pixels for no, pixels in zip(refused, decoded, strict=True)]

    calls: list[int] = []
    images = [JPEG, PLAIN["4:4:4"], PLAIN["progressive"]]
    for decoding, data in zip(run(on_gpu(decode), images), images, strict=True):
        assert off(decoding.picture, data) < 0.01
        assert decoding.encoded is None
    assert calls == [3]


def test_what_neither_can_decode_fails_alone() -> None:
    broken = JPEG.replace(b"\xff\xdb", b"\xff\xe5")  # its quantisation tables are hidden
    good, bad = run(on_gpu(refusing(broken)), [JPEG, broken])
    assert off(good.picture, JPEG) < 0.01
    assert isinstance(bad.error, UnreadableImage)


@pytest.mark.parametrize("threads", [1, 2])
def test_without_a_working_gpu_everything_is_decoded_on_the_cpu(threads: int) -> None:
    images = [JPEG, PLAIN["4:4:4"]]
    for decoding, data in zip(run(on_gpu(nothing, threads), images), images, strict=True):
        assert off(decoding.picture, data) == 0
        assert decoding.encoded is None


def test_an_image_of_another_size_than_its_header_says_is_not_taken() -> None:
    decoder = on_gpu(lambda images: [pixels[:, :-1] for pixels in stand_in(images)])
    [decoding] = run(decoder, [JPEG])
    assert off(decoding.picture, JPEG) == 0


def test_chunks_are_bounded_by_their_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handler.decoders, "CHUNK_PIXELS", 2 * 501 * 343 + 5)
    decode = Counting()
    other = encode(plain(RED, (321, 321)), "JPEG")
    large = encode(noise((700, 500)), "JPEG")
    run(on_gpu(decode), [JPEG, JPEG, JPEG, other, large, other])
    assert decode.calls == [2, 2, 1, 1]  # from small to large


def test_chunks_are_bounded_by_their_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handler.decoders, "CHUNK_IMAGES", 2)
    decode = Counting()
    run(on_gpu(decode), [JPEG] * 5)
    assert decode.calls == [2, 2, 1]


def test_no_image_is_padded_to_the_size_of_a_huge_one() -> None:
    decode = Counting()
    huge, strip = encode(noise((1200, 900)), "JPEG"), encode(noise((1100, 60)), "JPEG")
    high = turned(noise((60, 1100)), 6, "JPEG")  # stored as the other strip is
    run(on_gpu(decode), [huge, JPEG, JPEG, strip, high, JPEG])
    assert decode.calls == [3, 1, 1, 1]


def test_images_come_out_before_the_last_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handler.decoders, "CHUNK_PIXELS", 1)
    decode = Counting()
    decoder = on_gpu(decode)
    finished = decoder.finish([decoder.start(open_image(JPEG, Settings())) for _ in range(3)])
    next(finished)
    assert decode.calls == [1]


# --- Which decoder


def choose(decoder: str = "auto", device: str = "cuda:0") -> tuple[str, dict[str, object]]:
    chosen, reason = choose_decoder(TRANSFORM, Settings(decoder=decoder), device, threads=1)
    return chosen.name, reason


def brighter(images: list[Tensor]) -> list[Tensor]:
    return [pixels.clamp(max=250) + 5 for pixels in stand_in(images)]


def only_444(images: list[Tensor]) -> list[Tensor]:
    """Like nvJPEG, it has other pixels if chroma has fewer of its own."""
    sampled = [bytes(image.numpy()) for image in images]
    return [
        pixels if plain_sampling(open_image(data, Settings())) == "4:4:4" else pixels // 2
        for data, pixels in zip(sampled, stand_in(images), strict=True)
    ]


def refuses_422(images: list[Tensor]) -> list[Tensor | None]:
    sampled = [plain_sampling(open_image(bytes(image.numpy()), Settings())) for image in images]
    decoded = stand_in(images)
    return [None if name == "4:2:2" else one for name, one in zip(sampled, decoded, strict=True)]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Put decoders in the place of the GPU's libraries; returns the threads that they are given."""

    def put(**libraries: DecodeJpegs) -> list[int]:
        given: list[int] = []

        def load(name: str) -> Callable[[str, int], DecodeJpegs]:
            def call(device: str, threads: int) -> DecodeJpegs:
                assert device == "cuda:0"
                given.append(threads)
                return libraries[name]

            return call

        loaders = {name: load(name) for name in libraries}
        monkeypatch.setattr(handler.decoders, "GPU_LIBRARIES", loaders)
        monkeypatch.setattr(handler.decoders, "_stream", lambda _: None)
        return given

    return put


Use = Callable[..., list[int]]


def test_differences_of_the_same_decoder_are_within_the_tolerance() -> None:
    differences = on_gpu().differences()
    assert tuple(differences) == ALL_SAMPLINGS
    assert all(value is not None and 0 < value < 0.01 for value in differences.values())


def test_a_gpu_decoder_without_a_gpu_is_refused() -> None:
    with pytest.raises(InvalidSettings, match="decoder is gpu, and device is cpu"):
        choose("gpu", device="cpu")


def test_a_gpu_with_the_same_pixels_is_taken(use: Use) -> None:
    given = use(nvimgcodec=nothing, nvjpeg=stand_in)
    assert choose("auto") == choose("gpu") == ("nvjpeg", {})
    assert choose("cpu") == choose("auto", device="cpu") == ("cpu", {})
    assert given == [1, 1] * 2
    given = use(nvimgcodec=stand_in, nvjpeg=nothing)
    assert choose() == ("nvimgcodec", {})
    assert given == [1], "nvjpeg need not be tried"


def test_a_gpu_with_other_pixels_is_only_taken_if_it_is_asked_for(use: Use) -> None:
    use(nvjpeg=brighter)
    name, reason = choose("auto")
    assert name == "cpu"
    assert reason["tolerance"] == 0.01
    assert "samplings" not in reason
    differences = reason["nvjpeg"]
    assert isinstance(differences, dict)
    assert all(value == pytest.approx(5, abs=1) for value in differences.values())
    name, reason = choose("gpu")
    assert name == "nvjpeg"
    assert reason["samplings"] == ALL_SAMPLINGS


def test_the_gpu_decodes_the_samplings_of_which_it_has_the_pixels(use: Use) -> None:
    use(nvimgcodec=brighter, nvjpeg=only_444)
    name, reason = choose()
    assert (name, reason["samplings"]) == ("nvjpeg", ("4:4:4",))
    for library in ("nvimgcodec", "nvjpeg"):
        assert isinstance(reason[library], dict)
    name, reason = choose("gpu")
    assert (name, reason["samplings"]) == ("nvjpeg", ALL_SAMPLINGS)


def test_the_library_with_the_pixels_of_more_samplings_is_taken(use: Use) -> None:
    use(nvimgcodec=only_444, nvjpeg=refuses_422)
    name, reason = choose()
    assert (name, reason["samplings"]) == ("nvjpeg", ("4:4:4", "4:2:0"))
    assert isinstance(reason["nvjpeg"], dict)
    assert reason["nvjpeg"]["4:2:2"] is None
    use(nvimgcodec=refuses_422, nvjpeg=refuses_422)
    assert choose()[0] == "nvimgcodec"  # of two that are equal, the first


def test_a_gpu_that_cannot_decode_is_not_taken(use: Use) -> None:
    use(nvjpeg=nothing)
    assert choose() == ("cpu", {"nvjpeg": "nvJPEG is broken", "tolerance": 0.01})
    with pytest.raises(InvalidSettings, match=r"the GPU cannot decode: .*nvJPEG is broken"):
        choose("gpu")


def test_a_recipe_without_antialias_is_resized_on_the_cpu(use: Use) -> None:
    use(nvjpeg=stand_in)
    transform = replace(TRANSFORM, antialias=False)
    chosen, reason = choose_decoder(transform, Settings(), "cuda:0", threads=1)
    assert chosen.name == "cpu"
    assert reason["nvjpeg"] == "the recipe resizes without antialias"


# --- nvImageCodec on the CPU, where it decodes with libjpeg-turbo


@pytest.fixture(scope="module")
def codec() -> DecodeJpegs:
    return nvimgcodec("cpu", threads=1)


def test_nvimgcodec_gives_the_pixels_as_they_are_stored(codec: DecodeJpegs) -> None:
    decode = Counting(codec)
    images = [*PLAIN.values(), encode(noise((700, 333), seed=2), "JPEG")]
    for decoding, data in zip(run(on_gpu(decode), images), images, strict=True):
        assert off(decoding.picture, data) < 0.01
    assert decode.calls == [len(images)]


def test_an_image_that_nvimgcodec_refuses_is_refused_alone(codec: DecodeJpegs) -> None:
    broken = JPEG.replace(b"\xff\xdb", b"\xff\xe5")  # its quantisation tables are hidden
    decode = Counting(codec)
    good, bad = run(on_gpu(decode), [JPEG, broken])
    assert off(good.picture, JPEG) < 0.01
    assert isinstance(bad.error, UnreadableImage)
    assert decode.calls == [2]


def test_pixels_of_nvimgcodec_outlive_its_own_image(codec: DecodeJpegs) -> None:
    [data] = [PLAIN["4:4:4"]]
    kept = codec([torch.frombuffer(bytearray(data), dtype=torch.uint8)] * 4)
    for _ in range(8):
        codec([torch.frombuffer(bytearray(JPEG), dtype=torch.uint8)] * 4)
    [expected] = stand_in([torch.frombuffer(bytearray(data), dtype=torch.uint8)])
    assert all(pixels is not None and torch.equal(pixels, expected) for pixels in kept)


# --- On a GPU

LIBRARIES = handler.decoders.GPU_LIBRARIES
each_library = pytest.mark.parametrize("name", LIBRARIES)


def with_library(name: str) -> GpuDecoder:
    """As choose_decoder makes it."""
    decode_jpegs = LIBRARIES[name]("cuda:0", 2)
    stream = torch.cuda.Stream("cuda:0")
    return GpuDecoder(TRANSFORM, decode_jpegs, CpuDecoder(TRANSFORM), name, stream=stream)


@pytest.mark.gpu
@each_library
def test_a_gpu_gives_nearly_the_same_pixels(name: str) -> None:
    for decoding, data in zip(run(with_library(name), SOUND), SOUND, strict=True):
        assert off(decoding.picture, data) < 2  # torchvision's own tolerance for nvJPEG


@pytest.mark.gpu
@each_library
def test_a_gpu_and_damage(name: str) -> None:
    damaged = JPEG[: len(JPEG) // 2] + b"\xff\xd9"
    good, bad = run(with_library(name), [JPEG, damaged])
    assert off(good.picture, JPEG) < 2
    assert bad.picture or isinstance(bad.error, UnreadableImage)


@pytest.mark.gpu
def test_a_gpu_resizes_as_the_cpu_does() -> None:
    images = [read_pixels(noise((width, 375), seed=width)) for width in (500, 333, 90)]
    expected = resize_and_crop_batch([Turned(one, (0,), True) for one in images], TRANSFORM)
    given = resize_and_crop_batch([Turned(one.cuda(), (0,), True) for one in images], TRANSFORM)
    assert torch.equal(given.cpu(), expected)


def read_pixels(image: Image.Image) -> Tensor:
    return F.pil_to_tensor(image)


@pytest.mark.gpu
@each_library
def test_chunks_behind_a_busy_stream_keep_their_pixels(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """What a chunk freed is not decoded into while its resizing still waits for the GPU.

    The forward passes' stream is kept busy, and so is the decoder's own: it is the same GPU.
    """
    monkeypatch.setattr(handler.decoders, "CHUNK_PIXELS", 3 * 501 * 343)
    images = [encode(noise((501, 343), seed), "JPEG") for seed in range(12)]
    decoder = with_library(name)
    started = [decoder.start(open_image(data, Settings())) for data in images]
    for _ in decoder.finish(started):
        torch.cuda.synchronize()  # before the next chunk
    calm = [decoding.picture.pixels.clone() for decoding in started if decoding.picture]
    assert len(calm) == len(images)
    # The facts of each chunk are copied from pinned memory: to allocate it may wait for the GPU.
    del [torch.empty(192, dtype=torch.uint8, pin_memory=True) for _ in range(32)][:]
    for stream in (torch.cuda.current_stream(), decoder.stream):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(4 * 10**9)  # cycles: two seconds or more
            awake = torch.cuda.Event()
            awake.record()
        copies = []  # as the engine takes the pixels: on its stream, then they are freed
        for decoding in decoder.finish(
            [decoder.start(open_image(one, Settings())) for one in images]
        ):
            assert decoding.picture
            copies.append((decoding.size, decoding.picture.pixels.clone()))
            decoding.picture = None
        if name == "nvjpeg" or stream is not decoder.stream:
            assert not awake.query(), "the GPU had nothing left to do, so that nothing was tested"
        for one, (_, other) in zip(calm, copies, strict=True):
            assert torch.equal(one, other)


@pytest.mark.gpu
def test_the_choice_on_a_gpu_is_explained() -> None:
    chosen, reason = choose()
    if not reason:
        assert chosen in LIBRARIES
    else:
        assert ("samplings" in reason) == (chosen != "cpu")
    assert choose("cpu") == ("cpu", {})
