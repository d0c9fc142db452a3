"""A forward pass that also keeps what the classifier saw: the last feature maps.

Many networks end alike: the maps [B, K, h, w] are averaged over their positions, and one linear
layer makes the logits. What a position adds to a class is then that layer applied to it alone: a
class activation map (Zhou et al. 2016, https://arxiv.org/abs/1512.04150).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

POOLINGS = (functional.adaptive_avg_pool2d, torch.mean, Tensor.mean)


@dataclass(frozen=True)
class Inspection:
    """What a forward pass gave: float32, on the CPU."""

    probabilities: Tensor  # [B, C]
    maps: Tensor  # [B, K, h, w]
    weight: Tensor  # [C, K]: maps.mean((2, 3)) @ weight.T + bias are the logits
    bias: Tensor  # [C]

    def __len__(self) -> int:
        return len(self.probabilities)

    def each(self) -> "Iterator[Inspection]":
        """That of each image, B = 1."""
        for place in range(len(self)):
            one = slice(place, place + 1)
            yield replace(self, probabilities=self.probabilities[one], maps=self.maps[one])


class NotInspectable(Exception):
    """The logits of the network are not one linear layer over the mean of its last maps."""


@torch.inference_mode()
def inspect(model: Callable[[Tensor], Tensor], images: Tensor) -> Inspection:
    """Run a model of torch from pixels [B, 3, H, W] to probabilities, and see how it ends.

    Raises NotInspectable.
    """
    with _LastLayers() as last:
        probabilities = model(images)
    if last.maps is None or last.weight is None:
        raise NotInspectable
    pooled, logits = last.pooled.flatten(1), last.logits
    if pooled.shape != last.features.shape or not torch.equal(pooled, last.features):
        raise NotInspectable
    if not torch.equal(logits.float().softmax(1), probabilities):
        raise NotInspectable
    bias = torch.zeros(len(last.weight)) if last.bias is None else last.bias
    found = (probabilities, last.maps, last.weight, bias)
    return Inspection(*(tensor.detach().float().cpu() for tensor in found))


class _LastLayers(TorchFunctionMode):
    """Keeps the tensors of the last mean over positions, and of the last linear layer."""

    maps: Tensor | None = None
    pooled: Tensor  # their mean
    weight: Tensor | None = None
    bias: Tensor | None = None
    features: Tensor  # what the linear layer is applied to
    logits: Tensor

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in POOLINGS:
            shape = args[0].shape
            each = shape[:2]  # image and channel
            if len(shape) == 4 and result.shape[:2] == each and result.numel() == prod(each):
                self.maps, self.pooled = args[0], result
        elif func is functional.linear:
            self.features, self.weight, self.bias = args
            self.logits = result
        return result
