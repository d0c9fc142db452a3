"""Resize and crop, against the recipe's own transforms."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import get_weight
from torchvision.transforms import functional as F  # noqa: N812

from handler.images import read_picture
from handler.networks import input_transform
from handler.resize import resize_and_crop, resize_and_crop_batch
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


# --- On a GPU: a batch, in floats


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (333, 601), (1024, 768), (330, 9000)])
@pytest.mark.parametrize(
    "name", ["ResNet50_Weights.IMAGENET1K_V2", "EfficientNet_B0_Weights.IMAGENET1K_V1"]
)
def test_floats_are_resized_as_bytes_are(size: tuple[int, int], name: str) -> None:
    transform = input_transform(get_weight(name))
    pictures = [np.array(noise(size, seed=seed)) for seed in range(2)]
    expected = torch.stack([resize_and_crop(pixels, transform) for pixels in pictures])
    images = torch.stack([torch.from_numpy(pixels).permute(2, 0, 1) for pixels in pictures])
    given = resize_and_crop_batch(images, transform)
    assert given.dtype == torch.uint8
    difference = (given.float() - expected.float()).abs()
    assert difference.mean() < 0.01
    assert difference.max() <= 2


@pytest.mark.gpu
def test_floats_on_a_gpu_are_resized_as_on_the_cpu() -> None:
    images = torch.from_numpy(np.array(noise((500, 375)))).permute(2, 0, 1)[None]
    transform = replace(TRANSFORM, crop_size=200)
    given = resize_and_crop_batch(images.cuda(), transform).cpu()
    expected = resize_and_crop_batch(images, transform)
    assert (given.float() - expected.float()).abs().mean() < 0.01
