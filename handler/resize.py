"""Decoded pixels to the model's input: the recipe's resize and center crop."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from handler.model_card import InputTransform

Pixels = NDArray[np.uint8]  # RGB [H, W, 3]

MAX_ASPECT_RATIO = 16  # of what is resized; of a longer image only the center is


def resize_and_crop(pixels: Pixels, transform: InputTransform) -> Tensor:
    """uint8 RGB [H, W, 3] to uint8 [3, crop, crop]: the recipe's resize and crop.

    Stops before torchvision's normalisation, because a batch of bytes is a quarter of the floats.
    """
    # Channels last in memory, as decoders give them: torch's vectorised resize is made for that.
    image = crop_long_strip(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    height, width = target_size(image.shape[2:], transform)
    if (height, width) != image.shape[2:]:
        if needs_pillow_resize(image.shape[2:], transform):
            pixels = image[0].permute(1, 2, 0).numpy()
            method = Image.Resampling[transform.interpolation.upper()]
            resized = np.array(Image.fromarray(pixels).resize((width, height), method))
            image = torch.from_numpy(resized).permute(2, 0, 1)[None]
        else:
            image = functional.interpolate(
                image, (height, width), mode=transform.interpolation, antialias=transform.antialias
            )
    return center_crop(image, transform.crop_size)[0].contiguous()


def crop_long_strip(images: Tensor) -> Tensor:
    """[B, C, H, W] without the ends of a long strip, which the recipe's center crop would discard.

    The recipe resizes the shorter side first, so it would make 232 x 11 million pixels of a strip
    of 1 x 50,000.
    """
    return center_crop(images, MAX_ASPECT_RATIO * min(images.shape[2:]))


def region_of(size: Sequence[int], transform: InputTransform) -> list[int]:
    """Where in an image of this width and height the model looks: left, top, right, bottom.

    It undoes the steps of `resize_and_crop`, to the nearest pixel.
    """
    longest = MAX_ASPECT_RATIO * min(size)
    kept = [min(side, longest) for side in size]
    edges = []
    for whole, side, target in zip(size, kept, target_size(kept, transform), strict=True):
        strip = round((whole - side) / 2)
        first = max(0, round((target - transform.crop_size) / 2))
        last = min(target, first + transform.crop_size)
        edges.append([round(strip + place * side / target) for place in (first, last)])
    (left, right), (top, bottom) = edges
    return [left, top, right, bottom]


def target_size(size: Sequence[int], transform: InputTransform) -> tuple[int, int]:
    """Height and width before the resize to those after it; the recipe gives the shorter side."""
    short = min(size)
    height, width = (
        transform.resize_size if side == short else int(transform.resize_size * side / short)
        for side in size
    )
    return height, width


def needs_pillow_resize(size: Sequence[int], transform: InputTransform) -> bool:
    """Whether Pillow itself has to resize an image of this size, because it shrinks by 5/4, 7/4, ….

    Many values then fall exactly between two levels. torch's weights of 15 bits round them
    differently from Pillow's of 22 bits, which define the recipe's results.
    """
    short = min(size)
    return 4 * short % transform.resize_size == 0 and 2 * short % transform.resize_size != 0


def center_crop(images: Tensor, longest: int) -> Tensor:
    """The center of [B, C, H, W], at most `longest` pixels a side; rounds as torchvision does."""
    height, width = images.shape[2:]
    top, left = (max(0, round((side - longest) / 2)) for side in (height, width))
    return images[:, :, top : top + longest, left : left + longest]
