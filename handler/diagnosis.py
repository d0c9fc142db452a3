"""Which stage differs from the reference, and how: asked only when the certificate is refused.

It tries what people get wrong, until one of these gives what the reference gave.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BytesIO
from itertools import product

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor, nn

from handler.engine import Engine
from handler.golden import AGAIN, MAX_FP32_ERROR, Golden
from handler.images import to_rgb
from handler.model_card import InputTransform, ModelCard
from handler.resize import resize_and_crop
from handler.torch_engine import TorchEager

CLOSE = 0.5  # mean levels of 255 of an image: other sizes, methods and channels are further apart
# What people normalise with: ImageNet's mean and deviation, -1 to 1, 0 to 1, 0 to 255.
NORMALISATIONS = (
    ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)),
)


def pixel_fault(golden: Golden, card: ModelCard, pixels: Tensor) -> str:
    """What is wrong with the pixels, uint8 RGB [N, 3, H, W], that a worker makes of the images."""
    if distance(pixels.flip(1), golden.pixels) <= CLOSE:
        return "channel order: the decoder gives BGR, and the reference is RGB"
    name, data = next(iter(golden.files.items()))
    whole = np.array(plain_image(data))

    def off(transform: InputTransform) -> float:
        return distance(resize_and_crop(whole, transform), golden.pixels[0])

    nearest = min(resizes(card.transform), key=off)  # the archive's own is the first of equals
    if off(nearest) > CLOSE:
        return f"resize: none that is known makes the reference's pixels of {name}; {AGAIN}"
    own = card.transform
    wrong = [
        f"{field} is {getattr(own, field)} here and {getattr(nearest, field)} in the reference"
        for field in ("resize_size", "interpolation", "antialias")
        if getattr(own, field) != getattr(nearest, field)
    ]
    if wrong:
        return f"resize: {', '.join(wrong)}; {AGAIN}"
    differences = (pixels.float() - golden.pixels.float()).abs()
    worst, name = max(zip(differences.mean(dim=(1, 2, 3)).tolist(), golden.files, strict=True))
    return (
        f"decoder: its pixels differ from the reference's by {worst:.2f} levels of 255 on average "
        f"in the golden image {name}, and by {differences.max():.0f} at most; see the versions of "
        "simplejpeg and pillow in requirements.txt"
    )


def resizes(own: InputTransform) -> Iterator[InputTransform]:
    """The archive's own, then others."""
    yield own
    sizes = range(own.crop_size, own.crop_size * 4 // 3)
    for antialias, method, size in product((True, False), ("bilinear", "bicubic"), sizes):
        yield replace(own, resize_size=size, interpolation=method, antialias=antialias)


def plain_image(data: bytes) -> Image.Image:
    """RGB, upright, by Pillow. Raises what Pillow raises."""
    return to_rgb(ImageOps.exif_transpose(Image.open(BytesIO(data))))


def distance(found: Tensor, expected: Tensor) -> float:
    """Mean levels of 255."""
    return (found.float() - expected.float()).abs().mean().item()


def engine_fault(
    golden: Golden, card: ModelCard, engine: Engine, load_network: Callable[[], nn.Module]
) -> str:
    """What is wrong with an engine in fp32 that does not give the reference's logits."""
    if golden.compare(engine, golden.pixels.flip(1)).fits(MAX_FP32_ERROR):
        return f"channel order: {engine.name} takes BGR, and the reference is RGB; {AGAIN}"
    network, own = load_network(), card.transform

    def fits(transform: InputTransform) -> bool:
        return golden.compare(TorchEager(network, transform)).fits(MAX_FP32_ERROR)

    if engine.name != "torch-fp32" and fits(own):
        return (
            f"engine: {engine.name} computes something else than the network, which plain torch "
            "computes as the reference does; CLASSIFIER_ENGINE=torch does without it"
        )
    for mean, std in NORMALISATIONS:
        if (mean, std) != (own.mean, own.std) and fits(replace(own, mean=mean, std=std)):
            return (
                f"normalisation: mean {own.mean} and std {own.std} here, mean {mean} and std {std} "
                f"in the reference; {AGAIN}"
            )
    return f"weights: the network is not the one that gave the reference's logits; {AGAIN}"
