"""Resize and crop, against the recipe's own transforms."""

from dataclasses import replace
from itertools import cycle

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.models import get_weight
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F  # noqa: N812

from handler.batch_resize import Turned, can_resize, resize_and_crop_batch
from handler.images import read_picture
from handler.model_card import InputTransform
from handler.networks import input_transform
from handler.resize import (
    center_crop,
    crop_long_strip,
    region_of,
    resize_and_crop,
    target_size,
)
from handler.settings import Settings
from tests.drawing import encode, noise
from tests.unit.handler.pictures import TRANSFORM

RECIPES = (
    "MobileNet_V2_Weights.IMAGENET1K_V1",
    "MobileNet_V2_Weights.IMAGENET1K_V2",
    "ResNet50_Weights.IMAGENET1K_V2",
    "EfficientNet_B1_Weights.IMAGENET1K_V1",
    "Inception_V3_Weights.IMAGENET1K_V1",
    "ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1",
    "ViT_B_16_Weights.IMAGENET1K_SWAG_LINEAR_V1",
)


def assert_pixels_are_those_of(name: str, image: Image.Image) -> None:
    """To a fiftieth of a level on average, two at most: each rounds twice, in its own way."""
    recipe = get_weight(name)
    transform = input_transform(recipe)
    ours = read_picture(encode(image), transform, Settings()).pixels.float()
    mean = torch.tensor(transform.mean).view(3, 1, 1)
    std = torch.tensor(transform.std).view(3, 1, 1)
    expected = (recipe.transforms()(image) * std + mean) * 255
    difference = (ours - expected).abs()
    assert difference.mean() < 0.02
    assert difference.max() < 2.01


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("size", [(500, 375), (90, 640), (33, 57)], ids=str)
def test_pixels_are_those_of_the_recipe(name: str, size: tuple[int, int]) -> None:
    assert_pixels_are_those_of(name, noise(size))


@pytest.mark.parametrize("size", [(1000, 40), (10, 400)], ids=str)
def test_pixels_of_a_strip_are_those_of_the_recipe(size: tuple[int, int]) -> None:
    """Of which the recipe takes the center, after resizing all of it."""
    assert_pixels_are_those_of("MobileNet_V2_Weights.IMAGENET1K_V1", noise(size))


@pytest.mark.parametrize("short", [320, 448, 576])
def test_ratios_with_many_ties_are_rounded_as_the_recipe_does(short: int) -> None:
    recipe = get_weight("MobileNet_V2_Weights.IMAGENET1K_V1")
    image = noise((short + 100, short))
    ours = read_picture(encode(image), input_transform(recipe), Settings()).pixels
    resized = F.center_crop(F.resize(image, [256], antialias=True), [224])
    assert torch.equal(ours, F.pil_to_tensor(resized))


# --- On a GPU: images of any sizes together


def as_pillow(image: Image.Image, transform: InputTransform) -> Tensor:
    """uint8 [3, crop, crop] by Pillow, of what is left of a strip."""
    kept = crop_long_strip(F.pil_to_tensor(image)[None])
    size = target_size(kept.shape[2:], transform)
    method = InterpolationMode(transform.interpolation)
    resized = F.resize(F.to_pil_image(kept[0]), [*size], method, antialias=True)
    return center_crop(F.pil_to_tensor(resized)[None], transform.crop_size)[0]


# In the order of images.UPRIGHT; Pillow's own names for what they are.
TURNS = {
    ((), False): (),
    ((1,), False): (Image.Transpose.FLIP_LEFT_RIGHT,),
    ((0, 1), False): (Image.Transpose.ROTATE_180,),
    ((0,), False): (Image.Transpose.FLIP_TOP_BOTTOM,),
    ((), True): (Image.Transpose.TRANSPOSE,),
    ((0,), True): (Image.Transpose.ROTATE_270,),
    ((0, 1), True): (Image.Transpose.TRANSVERSE,),
    ((1,), True): (Image.Transpose.ROTATE_90,),
}
SIZES = [
    (500, 375),
    (375, 500),
    (320, 420),
    (333, 601),
    (1024, 768),
    (330, 9000),
    (17, 300),
    (1, 1),
]


def turned_alike(image: Image.Image, turn: tuple[tuple[int, ...], bool]) -> Image.Image:
    for transpose in TURNS[turn]:
        image = image.transpose(transpose)
    return image


@pytest.mark.parametrize(
    "name",
    [
        "ResNet50_Weights.IMAGENET1K_V2",
        "EfficientNet_B0_Weights.IMAGENET1K_V1",  # bicubic
        "Inception_V3_Weights.IMAGENET1K_V1",
        "ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1",  # bicubic, with nothing to crop
    ],
)
def test_a_batch_of_many_sizes_is_resized_exactly_as_pillow_does(name: str) -> None:
    """Each in another turn, some of them twice."""
    transform = input_transform(get_weight(name))
    stored = [noise(size, seed=seed) for seed, size in enumerate(SIZES)]
    batch = list(zip(stored, cycle(TURNS), strict=False))
    given = resize_and_crop_batch(
        [Turned(F.pil_to_tensor(image), *turn) for image, turn in batch], transform
    )
    assert given.dtype == torch.uint8
    assert given.is_contiguous()
    for one, (image, turn) in zip(given, batch, strict=True):
        assert torch.equal(one, as_pillow(turned_alike(image, turn), transform)), (image.size, turn)


@pytest.mark.parametrize("sides", [range(1, 60, 7), range(225, 330, 9), range(900, 1000, 57)])
def test_each_length_of_a_side_is_resized_exactly_as_pillow_does(sides: range) -> None:
    images = [noise((side + 13, side), seed=side) for side in sides]
    given = resize_and_crop_batch([Turned(F.pil_to_tensor(image)) for image in images], TRANSFORM)
    for one, image in zip(given, images, strict=True):
        assert torch.equal(one, as_pillow(image, TRANSFORM)), image.size


def test_rows_of_other_strides_are_resized_alike() -> None:
    """As nvImageCodec gives them: three values of a pixel beside each other."""
    image = noise((500, 375))
    pixels = F.pil_to_tensor(image)
    planes = pixels.contiguous()
    assert planes.stride() != pixels.stride() == (1, 1500, 3)
    one, other = resize_and_crop_batch([Turned(planes), Turned(pixels)], TRANSFORM)
    assert torch.equal(one, other)


def test_extremes_neither_overflow_nor_wrap() -> None:
    """Bicubic weights are negative in part: black and white beside each other overshoot."""
    transform = replace(TRANSFORM, interpolation="bicubic")
    sharp = (np.indices((400, 600)).sum(axis=0) // 3 % 2 * 255).astype(np.uint8)
    image = Image.fromarray(np.stack([sharp] * 3, axis=2))
    [given] = resize_and_crop_batch([Turned(F.pil_to_tensor(image))], transform)
    assert torch.equal(given, as_pillow(image, transform))
    assert (given.min(), given.max()) == (0, 255)


def test_only_recipes_that_resize_as_pillow_does_are_resized_together() -> None:
    assert can_resize(TRANSFORM)
    assert not can_resize(replace(TRANSFORM, antialias=False))
    assert not can_resize(replace(TRANSFORM, interpolation="nearest"))


@pytest.mark.parametrize("size", [(400, 300), (300, 401), (90, 60), (1000, 20), (256, 256)])
def test_the_region_is_where_the_crop_was(size: tuple[int, int]) -> None:
    """Found again by an image whose red is the column and whose green is the row."""
    width, height = size
    columns, rows = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    pixels = np.stack([columns, rows, 0 * rows], axis=-1).round().astype(np.uint8)
    transform = replace(TRANSFORM, resize_size=256, crop_size=224)
    crop = resize_and_crop(pixels, transform).float()
    left, top, right, bottom = region_of(size, transform)
    shown = crop[0].min(), crop[1].min(), crop[0].max(), crop[1].max()
    for edge, level, side in zip((left, top, right, bottom), shown, (*size, *size), strict=True):
        assert edge == pytest.approx(level.item() / 255 * (side - 1) + 0.5, abs=0.02 * side + 1)
