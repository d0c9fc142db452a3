"""State dicts as torchvision's networks have them, and what fitting makes of them."""

from functools import cache
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor

from handler.errors import InvalidModel
from handler.networks import get_recipe
from service.archive.checkpoints import Checkpoint
from service.archive.fitting import Fit, fit_checkpoint

TINY = ("squeezenet1_1", "mobilenet_v3_small", "shufflenet_v2_x0_5")


def state_of(architecture: str, classes: int = 3) -> dict[str, Tensor]:
    return dict(_state_of(architecture, classes))


@cache
def _state_of(architecture: str, classes: int) -> dict[str, Tensor]:
    """The names and shapes that torchvision itself would save, with a number for each tensor.

    The number is there once, not as often as the shape says: most networks are large.
    """
    extra = {"init_weights": False} if architecture in ("googlenet", "inception_v3") else {}
    # torchvision computes the widths of a RegNet with tensors, so its own needs real ones
    with torch.device("cpu" if architecture.startswith("regnet") else "meta"):
        network = torchvision.models.get_model(
            architecture, weights=None, num_classes=classes, **extra
        )
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand((), generator=generator).to(tensor.dtype).expand(tensor.shape)
        for name, tensor in network.state_dict().items()
    }


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def other(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Other weights of the same shapes, as an average or a later epoch has them."""
    return {
        name: tensor * 0.5 if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }


def fit(
    architecture: str,
    tables: dict[str, Any],
    prefix: str | None = None,
    entries: tuple[str, ...] = (),
) -> Fit:
    """A flat state dict, or several under their keys."""
    if all(isinstance(value, Tensor) for value in tables.values()):
        tables = {"": tables}
    return fit_checkpoint(
        Checkpoint(tables, entries), get_recipe(architecture), architecture, prefix
    )


def misfit(architecture: str, tables: dict[str, Any], prefix: str | None = None) -> str:
    with pytest.raises(InvalidModel) as refusal:
        fit(architecture, tables, prefix)
    return str(refusal.value)


def same(fitted: Fit, state: dict[str, Tensor]) -> bool:
    return list(fitted.state) == list(state) and all(
        torch.equal(fitted.state[name], state[name]) for name in state
    )
