"""torchvision classifiers by name: what goes into them, how they are built and filled."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision.models import WeightsEnum
from torchvision.transforms._presets import ImageClassification

from handler.errors import InvalidModel
from handler.model_card import InputTransform

# Their `transform_input` scales the normalised input once more. torchvision turns it on if it loads
# pretrained weights, and no state dict tells.
SCALE_INPUT_AGAIN = ("googlenet", "inception_v3")


def architectures() -> list[str]:
    """Every image classifier that torchvision can build."""
    return torchvision.models.list_models(module=torchvision.models)


def get_recipe(architecture: str, name: str | None = None) -> WeightsEnum:
    """The weights entry `name` of an architecture, or its DEFAULT. Raises InvalidModel."""
    if architecture not in architectures():
        raise InvalidModel(
            f"{architecture!r} is not a torchvision classifier; known: {', '.join(architectures())}"
        )
    entries = torchvision.models.get_model_weights(architecture)
    if name is None:
        return entries.DEFAULT
    # Entries without class names are for feature extraction: their last layer is no classifier.
    known = {str(recipe): recipe for recipe in entries if recipe.meta["categories"]}
    if name not in known:
        raise InvalidModel(f"{name!r} is not a recipe of {architecture}; known: {', '.join(known)}")
    return known[name]


def input_transform(recipe: WeightsEnum, transform_input: bool = False) -> InputTransform:
    """The recipe's own resize, crop and normalisation.

    `transform_input` of googlenet and inception_v3 turns (x - mean) / std into (x - 0.5) / 0.5,
    so it is given here, and never to the network.

    Raises InvalidModel for a recipe that is not of torchvision's classification kind.
    """
    preset = recipe.transforms()
    if not isinstance(preset, ImageClassification):
        raise InvalidModel(f"{recipe} has no image classification transforms")
    (resize_size,), (crop_size,) = preset.resize_size, preset.crop_size
    return InputTransform(
        resize_size=resize_size,
        crop_size=crop_size,
        interpolation=preset.interpolation.value,
        antialias=preset.antialias,
        mean=(0.5, 0.5, 0.5) if transform_input else tuple(preset.mean),
        std=(0.5, 0.5, 0.5) if transform_input else tuple(preset.std),
    )


def build_network(recipe: WeightsEnum, architecture: str, classes: int) -> nn.Module:
    """The architecture as its recipe needs it, with `classes` outputs and random weights."""
    return torchvision.models.get_model(
        architecture, weights=None, num_classes=classes, **_arguments(recipe, architecture)
    ).eval()


def empty_network(recipe: WeightsEnum, architecture: str, classes: int) -> nn.Module:
    """The same network with shapes and no memory, for weights to be assigned to."""
    with _WithoutMemory():
        return build_network(recipe, architecture, classes)


class _WithoutMemory(TorchFunctionMode):
    """Put what layers allocate on the meta device, and leave computed tensors alone.

    `torch.device("meta")` moves both, and RegNet's builder computes its widths with tensors.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.empty, torch.zeros, torch.ones):
            kwargs = kwargs | {"device": "meta"}
        return func(*args, **kwargs)


def _arguments(recipe: WeightsEnum, architecture: str) -> dict[str, Any]:
    """Builder arguments that torchvision only sets when it loads the weights itself.

    Auxiliary heads exist for training only, so they are neither built nor loaded.
    Source: the builders in torchvision/models/{googlenet,inception,vision_transformer}.py.
    """
    if architecture in SCALE_INPUT_AGAIN:
        return {"aux_logits": False, "transform_input": False, "init_weights": False}
    if architecture.startswith("vit_"):
        return {"image_size": recipe.meta["min_size"][0]}
    return {}


def load_state(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a network the tensors that are all of its names and shapes.

    With versions as they are today: mnasnet refuses tensors without one, which only torch's own
    files have.
    """
    versioned = OrderedDict(state)
    versioned._metadata = network.state_dict()._metadata  # type: ignore[attr-defined]
    network.load_state_dict(versioned, assign=True)
