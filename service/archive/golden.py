"""Golden images of an archive: drawn, and answered by the network itself."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from handler.golden import Golden
from handler.model_card import InputTransform
from handler.torch_engine import TorchEager

IMAGES = 8
SCALES = (3, 12, 48)  # cells a side: shapes, parts and textures


def make_golden(network: nn.Module, transform: InputTransform) -> Golden:
    """Drawn images with the network's answers in fp32."""
    images = draw_images(transform.crop_size)
    return Golden(images, TorchEager(network, transform).probabilities(images))


def draw_images(size: int) -> Tensor:
    """uint8 RGB [IMAGES, 3, size, size]: coloured patterns, coarse to fine, always the same."""
    generator = torch.Generator().manual_seed(0)
    levels = torch.full((IMAGES, 3, size, size), 0.5)
    for cells in SCALES:
        noise = torch.rand(IMAGES, 3, cells, cells, generator=generator) - 0.5
        contrast = torch.rand(IMAGES, 1, 1, 1, generator=generator)
        levels += contrast * functional.interpolate(noise, (size, size), mode="bicubic")
    return levels.mul(256).clamp(0, 255).to(torch.uint8)
