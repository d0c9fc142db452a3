"""Images of any sizes to the model's input together, exactly as Pillow resizes each of them.

Along one axis, a resize and a crop are a matrix product with few weights other than 0 in a row. So
a batch takes two products on the device, and no kernel for each image but the copy of its pixels.

Pillow rounds weights to 22 bits, sums integers, and rounds the sum to a level; first along the rows
and then along the columns. Here each weight is split into a coarse and a fine half of 11 bits. The
sums of both are whole numbers that float32 holds exactly (to 24 bits, for images up to 64 taps), in
any order, and with TF32 as well. Source: Pillow, src/libImaging/Resample.c.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from handler.model_card import InputTransform
from handler.resize import MAX_ASPECT_RATIO, target_size

WEIGHT_BITS = 22  # Pillow's PRECISION_BITS for pixels of 8 bits
FINE_BITS = 11  # of them in the fine half


def _bilinear(distance: Tensor) -> Tensor:
    return (1 - distance.abs()).clamp_(min=0)


def _bicubic(distance: Tensor) -> Tensor:
    """Keys' kernel with a = -0.5."""
    near = distance.abs()
    inner = (1.5 * near - 2.5) * near * near + 1
    outer = ((-0.5 * near + 2.5) * near - 4) * near + 2
    return torch.where(near < 1, inner, torch.where(near < 2, outer, 0.0))


# The filters by the names that recipes have for them, with how many pixels they reach.
FILTERS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "bilinear": (_bilinear, 1),
    "bicubic": (_bicubic, 2),
}


@dataclass(frozen=True)
class Turned:
    """Decoded pixels, and what turns them upright, as in images.UPRIGHT."""

    pixels: Tensor  # uint8 RGB [3, H, W] as stored, with any strides
    flipped: tuple[int, ...] = ()  # axes: 0 rows, 1 columns
    swapped: bool = False  # rows and columns, after that

    def axes(self) -> Iterator[tuple[int, bool]]:
        """Length and direction of the upright rows' and columns' axes: pixels, whether reversed."""
        for axis in (1, 0) if self.swapped else (0, 1):
            yield self.pixels.shape[1 + axis], axis in self.flipped


def can_resize(transform: InputTransform) -> bool:
    """Whether the recipe resizes as Pillow does, with antialias, by a filter that is known here."""
    return transform.antialias and transform.interpolation in FILTERS


def resize_and_crop_batch(images: Sequence[Turned], transform: InputTransform) -> Tensor:
    """Decoded images on one device to uint8 [B, 3, crop, crop] there, upright.

    Takes some 40 bytes for each pixel of B images that are all as high as the highest and as wide
    as the widest.
    """
    device, crop = images[0].pixels.device, transform.crop_size
    boxes = [_box(image, transform) for image in images]
    height, width = (max(rows.kept for rows in axes) for axes in zip(*boxes, strict=True))
    padded = torch.zeros(len(images), height, 3, width, device=device)
    for slot, image, (rows, columns) in zip(padded, images, boxes, strict=True):
        pixels = image.pixels.transpose(1, 2) if image.swapped else image.pixels
        kept = pixels[:, rows.start : rows.start + rows.kept]
        kept = kept[:, :, columns.start : columns.start + columns.kept]
        slot[: rows.kept, :, : columns.kept].copy_(kept.transpose(0, 1))
    by_axis = [axis for axes in zip(*boxes, strict=True) for axis in axes]  # all rows, then columns
    weights = _weights(by_axis, max(height, width), transform, device)
    rows_weights, columns_weights = weights.chunk(2)
    # [B, 3 H, W] x [B, W, 2 crop], of which the halves of the weights become one level each
    sums = padded.flatten(1, 2) @ columns_weights[..., :width].transpose(1, 2)
    levels = _levels(*sums.chunk(2, dim=2)).float().view(-1, height, 3 * crop)
    # [B, 2 crop, H] x [B, H, 3 crop]
    sums = rows_weights[..., :height] @ levels
    resized = _levels(*sums.chunk(2, dim=1)).view(-1, crop, 3, crop).transpose(1, 2)
    return resized.to(torch.uint8, memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class _Axis:
    """What becomes of an image along one of its upright axes."""

    start: int  # the first pixel that is resized, of those stored: the ends of a strip are not
    kept: int  # how many are
    target: int  # how many they would become
    first: int  # the first of these that the crop keeps
    reversed: bool  # whether they are stored from the end


def _box(image: Turned, transform: InputTransform) -> tuple[_Axis, _Axis]:
    """The rows' axis and the columns', as `resize_and_crop` has them for one image."""
    sides, directions = zip(*image.axes(), strict=True)
    kept = [min(side, MAX_ASPECT_RATIO * min(sides)) for side in sides]
    rows, columns = (
        _Axis(
            start=side - some - _center(side, some) if reverse else _center(side, some),
            kept=some,
            target=target,
            first=_center(target, transform.crop_size),
            reversed=reverse,
        )
        for side, some, target, reverse in zip(
            sides, kept, target_size(kept, transform), directions, strict=True
        )
    )
    return rows, columns


def _center(side: int, longest: int) -> int:
    """Where a center crop begins; rounds as torchvision does."""
    return max(0, round((side - longest) / 2))


def _weights(
    axes: Sequence[_Axis], longest: int, transform: InputTransform, device: torch.device
) -> Tensor:
    """Weights of the pixels of each axis for each place in the crop: float32 [A, 2 crop, longest].

    Whole numbers: first the coarse halves of all weights, then the fine ones. Pixels beyond an
    axis' end have 0.
    """
    function, reach = FILTERS[transform.interpolation]
    facts = torch.tensor(
        [(axis.kept, axis.target, axis.first, axis.reversed) for axis in axes],
        dtype=torch.float64,
        pin_memory=device.type == "cuda",  # without it the copy would wait for the whole stream
    ).to(device, non_blocking=True)
    kept, target, first, backwards = facts.view(-1, 4, 1, 1).unbind(1)
    scale = kept / target
    stretch = scale.clamp(min=1)
    places = torch.arange(transform.crop_size, dtype=torch.float64, device=device)
    center = (first + places.view(1, -1, 1) + 0.5) * scale
    begin = (center - reach * stretch + 0.5).floor_().clamp_(min=0)
    end = torch.minimum((center + reach * stretch + 0.5).floor_(), kept)
    taps = max(2 * ceil(reach * max(1, axis.kept / axis.target)) + 1 for axis in axes)
    pixel = begin + torch.arange(taps, dtype=torch.float64, device=device)
    weight = function((pixel - center + 0.5) * (1 / stretch)) * (pixel < end)
    weight /= weight.sum(dim=2, keepdim=True)
    weight *= 2**WEIGHT_BITS
    whole = weight.add_(weight.sign(), alpha=0.5).trunc_()
    coarse = (whole / 2**FINE_BITS).round_()
    halves = torch.cat((coarse, whole - coarse * 2**FINE_BITS), dim=1).float()
    # Taps beyond the end have the weight 0, wherever they are added.
    pixel = torch.where(backwards > 0, kept - 1 - pixel, pixel).clamp_(0, longest - 1).long()
    dense = torch.zeros(len(axes), 2 * transform.crop_size, longest, device=device)
    return dense.scatter_add_(2, pixel.repeat(1, 2, 1), halves)


def _levels(coarse: Tensor, fine: Tensor) -> Tensor:
    """Sums of both halves of the weights to levels from 0 to 255: int32, of the same shape."""
    sums = fine.int().add_(coarse.int(), alpha=2**FINE_BITS)
    return sums.add_(2 ** (WEIGHT_BITS - 1)).bitwise_right_shift_(WEIGHT_BITS).clamp_(0, 255)
