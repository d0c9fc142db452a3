"""A trainer's golden images, logits and names: taken if they agree, else the stage is named."""

import csv
import struct
import zlib
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torchvision.transforms import functional
from torchvision.transforms._presets import ImageClassification

from handler.errors import InvalidModel
from handler.golden import Golden
from service.archive.golden import DRAWN, draw_images, make_golden, reference_logits
from service.archive.trainer import (
    MAX_BYTES,
    MAX_IMAGES,
    check_decoding,
    check_logits,
    check_names,
    read_images,
    read_logits,
)
from tests.drawing import announced, encode, noise, png_chunk
from tests.unit.tiny import LABELS, tiny_card, tiny_network

PRESET = ImageClassification(resize_size=72, crop_size=64)
TRANSFORM = replace(tiny_card().transform, resize_size=72, crop_size=64)
# Called as drawn ones are, but for their folder.
FILES = {Path(name).name: data for name, data in list(draw_images(150).items())[:4]}
NETWORK = tiny_network()


def golden_of(files: dict[str, bytes]) -> Golden:
    return make_golden(NETWORK, PRESET, LABELS, files).only([*files])


@pytest.fixture(scope="module")
def golden() -> Golden:
    return golden_of(FILES)


def logits_with(prepare: Callable[[Image.Image], Tensor]) -> Tensor:
    from handler.diagnosis import plain_image

    return reference_logits(NETWORK, prepare, map(plain_image, FILES.values()))


def bgr(image: Image.Image) -> Tensor:
    return PRESET(Image.merge("RGB", image.split()[::-1]))


def resized(size: int) -> ImageClassification:
    preset = copy(PRESET)
    preset.resize_size = [size]
    return preset


def not_normalised(image: Image.Image) -> Tensor:
    preset = copy(PRESET)
    preset.mean, preset.std = [0.0] * 3, [1.0] * 3
    return preset(image)


def without_antialias(image: Image.Image) -> Tensor:
    pixels = functional.resize(functional.pil_to_tensor(image), [72], antialias=False)
    return PRESET(functional.center_crop(pixels, [72, 72]))


def test_logits_that_agree_are_taken(golden: Golden) -> None:
    check_logits(golden, logits_with(PRESET) + 3, NETWORK, PRESET)


@pytest.mark.parametrize(
    ("prepare", "stage"),
    [
        (bgr, "channel order: the trainer's are of BGR"),
        (resized(64), "resize: the trainer's have resize_size 64, and the recipe 72"),
        (not_normalised, r"normalisation: the trainer's have mean \(0.0, 0.0, 0.0\)"),
        (without_antialias, "resize: the trainer's are without antialias"),
    ],
)
def test_the_stage_that_differs_is_named(
    golden: Golden, prepare: Callable[[Image.Image], Tensor], stage: str
) -> None:
    with pytest.raises(InvalidModel, match=f"^--golden-logits, {stage}"):
        check_logits(golden, logits_with(prepare), NETWORK, PRESET)


def test_another_order_and_number_of_classes(golden: Golden) -> None:
    right = logits_with(PRESET)
    with pytest.raises(InvalidModel, match=r"labels: the trainer's classes are in another order"):
        check_logits(golden, right.roll(1, dims=1), NETWORK, PRESET)
    with pytest.raises(InvalidModel, match=r"labels: they are of 2 classes, the network has 3"):
        check_logits(golden, right[:, 1:], NETWORK, PRESET)


def test_logits_of_one_output_are_those_of_class_1() -> None:
    """A sigmoid's, which is served as the softmax of (0, x)."""
    logits = torch.tensor([[0.0, 1.5], [0.0, -2.0]])
    golden = Golden({"a.jpg": b"", "b.jpg": b""}, torch.empty(0), logits, ("no", "yes"))
    check_logits(golden, logits[:, 1:], NETWORK, PRESET)
    with pytest.raises(InvalidModel, match=r"they are of 1 classes, the network has 3"):
        check_logits(golden_of(FILES), torch.zeros(4, 1), NETWORK, PRESET)


def test_another_network(golden: Golden) -> None:
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(InvalidModel, match="weights: the trainer's network is another"):
        check_logits(golden, 9 * torch.rand(4, 3, generator=generator), NETWORK, PRESET)


def test_names_one_class_off_are_found(tmp_path: Path) -> None:
    labels = [f"bird {index}" for index in range(5)]
    golden = Golden(
        {str(index): b"" for index in range(4)}, torch.empty(0), 9 * torch.eye(4, 5), ()
    )
    (tmp_path / "labels.csv").write_text(
        "file,label\n" + "".join(f"{index},bird {index}\n" for index in range(3)) + "3,bird 0\n"
    )
    check_names(tmp_path, golden, labels)  # one of four is wrong, as models are
    with pytest.raises(InvalidModel, match=r"0 of 4 .* the classes \+1 3 would; correct --labels"):
        check_names(tmp_path, golden, ["background", *labels[:-1]])


def test_logits_of_each_form(tmp_path: Path) -> None:
    expected = torch.tensor([[1.5, -2.0, 0.25], [4.0, 5.0, 6.0]])
    names = ["a.jpg", "b.png"]
    np.save(tmp_path / "x.npy", expected.numpy())
    save_file(dict(zip(names, expected.unbind(), strict=True)), tmp_path / "x.safetensors")
    with (tmp_path / "x.csv").open("w", newline="") as file:
        rows = zip(names, expected.tolist(), strict=True)
        csv.writer(file).writerows([name, *values] for name, values in rows)
    for suffix in ("npy", "safetensors", "csv"):
        assert read_logits(tmp_path / f"x.{suffix}", names).equal(expected)
    for suffix in ("safetensors", "csv"):
        with pytest.raises(InvalidModel, match=r"there are none for c\.jpg"):
            read_logits(tmp_path / f"x.{suffix}", ["c.jpg"])
    with pytest.raises(InvalidModel, match=r"its shape is \[2, 3\], and there are 1 images"):
        read_logits(tmp_path / "x.npy", ["c.jpg"])


@pytest.mark.parametrize("name", ["x.txt", "missing.npy", "x.npy", "x.csv", "x.safetensors"])
def test_logits_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    if not name.startswith("missing"):
        (tmp_path / name).write_text("a.jpg,one,two\n")
    with pytest.raises(InvalidModel, match=r"^--golden-logits .*: \S"):
        read_logits(tmp_path / name, ["a.jpg"])


def test_images_are_bounded_in_number_and_size(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match="has 0 images, not 1 to 32"):
        read_images(tmp_path)
    (tmp_path / "large.jpg").write_bytes(bytes(MAX_BYTES + 1))
    with pytest.raises(InvalidModel, match=r"large\.jpg has more than 1048576 bytes"):
        read_images(tmp_path)
    for index in range(MAX_IMAGES):
        (tmp_path / f"{index}.jpg").touch()
    with pytest.raises(InvalidModel, match="has 33 images"):
        read_images(tmp_path)


def test_drawn_images_stay_whatever_the_trainers_are_called() -> None:
    golden = make_golden(NETWORK, PRESET, LABELS, FILES)
    assert [*golden.files] == [*DRAWN, *FILES]
    with pytest.raises(InvalidModel, match=r"large\.jpg has 2049x2048 pixels, 4194304 are allowed"):
        make_golden(NETWORK, PRESET, LABELS, {"large.jpg": announced("JPEG", 2049, 2048)})


def test_images_that_workers_decode_as_pillow_does(golden: Golden) -> None:
    check_decoding(golden, TRANSFORM)
    check_decoding(
        golden_of({"a.png": encode(noise()), "a.webp": encode(noise(), "WEBP")}), TRANSFORM
    )


def test_an_image_that_workers_do_not_serve_is_refused_by_name() -> None:
    golden = golden_of({"a.png": encode(noise()), "b.tif": encode(noise(), "TIFF")})
    message = r"^--golden, decoder: it refuses the golden image b\.tif: TIFF is not served; send"
    with pytest.raises(InvalidModel, match=message):
        check_decoding(golden, TRANSFORM)


def test_an_image_that_pillow_reads_otherwise_than_workers_is_refused_by_name() -> None:
    """Grey of 4 bits, of which one level is transparent: Pillow takes the level for one of 256."""
    header = struct.pack(">IIBBBBB", 64, 64, 4, 0, 0, 0, 0)
    levels = (b"\0" + 16 * b"\x33" + 16 * b"\x99") * 64
    data = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)
    data += png_chunk(b"tRNS", struct.pack(">H", 3)) + png_chunk(b"IDAT", zlib.compress(levels))
    golden = golden_of({"grey.png": data + png_chunk(b"IEND", b"")})
    message = (
        r"^--golden, decoder: its pixels of grey\.png differ from Pillow's by \d+\.\d\d levels"
    )
    with pytest.raises(InvalidModel, match=message):
        check_decoding(golden, TRANSFORM)


def test_what_is_no_image_is_named() -> None:
    with pytest.raises(InvalidModel, match=r"--golden: x\.jpg cannot be read as an image"):
        make_golden(NETWORK, PRESET, LABELS, {"x.jpg": b"x"})
