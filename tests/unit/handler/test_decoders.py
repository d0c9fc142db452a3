"""Decoders: what each gives, whatever else is in the batch.

nvJPEG needs a GPU. In its place stands torchvision's decoder for the CPU, which is called the same
way, so that all that is around nvJPEG is tested everywhere.
"""

import threading
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

import handler.decoders
from handler.decoders import (
    CpuDecoder,
    DecodeJpegs,
    Decoder,
    Decoding,
    GpuDecoder,
    choose_decoder,
    nvjpeg,
)
from handler.errors import InvalidSettings, UnreadableImage
from handler.images import Picture, open_image, read_picture
from handler.networks import input_transform
from handler.resize import resize_and_crop_batch
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

    def __call__(self, images: list[Tensor]) -> list[Tensor]:
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


@pytest.mark.parametrize("short", [64, 300, 320, 448])  # 320 and 448 are what Pillow resizes
def test_small_and_uneven_sizes_go_to_the_cpu(short: int) -> None:
    data = encode(noise((500, short)), "JPEG")
    decode = Counting()
    [decoding] = run(on_gpu(decode), [data])
    assert decode.calls == []
    assert off(decoding.picture, data) == 0


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


def test_images_of_one_size_are_resized_together(monkeypatch: pytest.MonkeyPatch) -> None:
    resized = []

    def watched(images: Tensor, *args: object) -> Tensor:
        resized.append(len(images))
        return resize_and_crop_batch(images, TRANSFORM)

    monkeypatch.setattr(handler.decoders, "resize_and_crop_batch", watched)
    wide, high = encode(noise((501, 343)), "JPEG"), encode(noise((343, 501)), "JPEG")
    run(on_gpu(), [wide, high, wide, turned(noise((501, 343)), 6, "JPEG"), high])
    assert sorted(resized) == [2, 3]


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
    assert decode.calls == [2, 2, 1, 1]


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


def use(monkeypatch: pytest.MonkeyPatch, decode_jpegs: DecodeJpegs) -> None:
    monkeypatch.setattr(handler.decoders, "nvjpeg", lambda _: decode_jpegs)


def test_differences_of_the_same_decoder_are_within_the_tolerance() -> None:
    differences = on_gpu().differences()
    assert list(differences) == ["4:4:4", "4:2:2", "4:2:0"]
    assert 0 < max(differences.values()) < 0.01


def test_a_gpu_decoder_without_a_gpu_is_refused() -> None:
    with pytest.raises(InvalidSettings, match="decoder is gpu, and device is cpu"):
        choose("gpu", device="cpu")


def test_a_gpu_with_the_same_pixels_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, stand_in)
    assert choose("auto") == choose("gpu") == ("nvjpeg", {})
    assert choose("cpu") == choose("auto", device="cpu") == ("cpu", {})


@pytest.mark.parametrize(("decoder", "name"), [("auto", "cpu"), ("gpu", "nvjpeg")])
def test_a_gpu_with_other_pixels_is_only_taken_if_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, decoder: str, name: str
) -> None:
    use(monkeypatch, brighter)
    chosen, reason = choose(decoder)
    assert chosen == name
    assert reason["tolerance"] == 0.01
    differences = reason["differences"]
    assert isinstance(differences, dict)
    assert all(value == pytest.approx(5, abs=1) for value in differences.values())


def test_a_gpu_that_cannot_decode_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, nothing)
    assert choose() == ("cpu", {"cause": "nvJPEG is broken"})
    with pytest.raises(InvalidSettings, match="nvJPEG does not run here: nvJPEG is broken"):
        choose("gpu")


# --- On a GPU


@pytest.mark.gpu
def test_nvjpeg_gives_nearly_the_same_pixels() -> None:
    for decoding, data in zip(run(on_gpu(nvjpeg("cuda:0")), SOUND), SOUND, strict=True):
        assert off(decoding.picture, data) < 2  # torchvision's own tolerance for nvJPEG


@pytest.mark.gpu
def test_nvjpeg_and_damage() -> None:
    damaged = JPEG[: len(JPEG) // 2] + b"\xff\xd9"
    good, bad = run(on_gpu(nvjpeg("cuda:0")), [JPEG, damaged])
    assert off(good.picture, JPEG) < 2
    assert bad.picture or isinstance(bad.error, UnreadableImage)


@pytest.mark.gpu
def test_chunks_behind_a_busy_stream_keep_their_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a chunk freed is not decoded into while its resizing still waits for the GPU."""
    monkeypatch.setattr(handler.decoders, "CHUNK_PIXELS", 3 * 501 * 343)
    images = [encode(noise((501, 343), seed), "JPEG") for seed in range(12)]
    decoder = on_gpu(nvjpeg("cuda:0"))
    started = [decoder.start(open_image(data, Settings())) for data in images]
    for _ in decoder.finish(started):
        torch.cuda.synchronize()  # before the next chunk
    calm = [decoding.picture for decoding in started]
    torch.cuda._sleep(4 * 10**9)  # cycles: two seconds or more
    awake = torch.cuda.Event()
    awake.record()
    busy = [decoding.picture for decoding in run(decoder, images)]
    assert not awake.query(), "the GPU had nothing left to do, so that nothing was tested"
    for one, other in zip(calm, busy, strict=True):
        assert one
        assert other
        assert torch.equal(one.pixels, other.pixels)


@pytest.mark.gpu
def test_the_choice_on_a_gpu_is_explained() -> None:
    chosen, reason = choose()
    assert chosen == ("cpu" if reason else "nvjpeg")
    assert choose("cpu") == ("cpu", {})
