"""torchvision classifiers by name: built, measured, and held against a state dict."""

import re
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
    known = [recipe for recipe in entries if recipe.meta["categories"]]
    for recipe in known:
        if str(recipe) == name:
            return recipe
    raise InvalidModel(
        f"{name!r} is not a recipe of {architecture}; known: {', '.join(map(str, known))}"
    )


def input_transform(recipe: WeightsEnum) -> InputTransform:
    """The recipe's own resize, crop and normalisation.

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
        mean=tuple(preset.mean),
        std=tuple(preset.std),
    )


def build_network(recipe: WeightsEnum, architecture: str, classes: int) -> nn.Module:
    """The architecture as its recipe wants it, with `classes` outputs and random weights."""
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
    if architecture in ("googlenet", "inception_v3"):
        return {"aux_logits": False, "transform_input": True, "init_weights": False}
    if architecture.startswith("vit_"):
        return {"image_size": recipe.meta["min_size"][0]}
    return {}


def clean_state_dict(state: Mapping[str, Tensor], architecture: str) -> dict[str, Tensor]:
    """Names as the network has them: without wrappers' prefixes, old spellings and unused heads."""
    cleaned = {}
    for name, tensor in state.items():
        name = re.sub(r"^(module\.|_orig_mod\.)+", "", name)  # DataParallel, torch.compile
        if architecture.startswith("densenet"):  # torchvision still ships "norm.1" for "norm1"
            name = re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.(\d\.)", r"\1\2", name)
        if architecture in ("googlenet", "inception_v3") and re.match(r"(aux\d|AuxLogits)\.", name):
            continue
        cleaned[name] = tensor
    return cleaned


def class_count(state: Mapping[str, Tensor], recipe: WeightsEnum, architecture: str) -> int:
    """The number of classes that a state dict's last layer gives.

    The layer is found by building the architecture for two class counts and comparing shapes.
    Raises InvalidModel where the state dict has no such layer.
    """
    two = empty_network(recipe, architecture, 2).state_dict()
    three = empty_network(recipe, architecture, 3).state_dict()
    head = [name for name in two if two[name].shape != three[name].shape]
    for name in head:
        if name in state and state[name].dim() > 0:
            return state[name].shape[0]
    raise InvalidModel(f"does not fit {architecture}: {head[0]} is missing")


def fit_state_dict(
    state: Mapping[str, Tensor], recipe: WeightsEnum, architecture: str, classes: int
) -> dict[str, Tensor]:
    """The state dict as the network takes it: complete, float32, in the network's order.

    Raises InvalidModel with the name of the first tensor that does not fit.
    """
    wanted = empty_network(recipe, architecture, classes).state_dict()
    fitted, problems = {}, []
    for name, tensor in wanted.items():
        given = state.get(name)
        if given is None and name.endswith("num_batches_tracked"):  # unused once trained
            fitted[name] = torch.zeros((), dtype=torch.int64)
        elif given is None:
            problems.append(f"{name} is missing")
        elif given.is_complex() or given.layout != torch.strided:
            problems.append(f"{name} is complex or sparse")
        elif given.shape != tensor.shape:
            seen, rule = list(given.shape), list(tensor.shape)
            problems.append(f"{name} has shape {seen}, {architecture} has {rule}")
        else:
            fitted[name] = given.detach().to("cpu", tensor.dtype).contiguous().clone()
    problems += [f"{name} is not part of it" for name in state if name not in wanted]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise InvalidModel(f"does not fit {architecture}: {problems[0]}{more}")
    return fitted
