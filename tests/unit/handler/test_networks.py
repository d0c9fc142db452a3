"""torchvision's classifiers: found, built and filled."""

import re

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import WeightsEnum
from torchvision.models.segmentation import FCN_ResNet50_Weights
from torchvision.transforms.functional import normalize

from handler.errors import InvalidModel
from handler.networks import (
    architectures,
    build_network,
    empty_network,
    get_recipe,
    input_transform,
    load_state,
)


def build_empty(recipe: WeightsEnum, architecture: str, classes: int) -> nn.Module:
    """Names and shapes alone, since most networks are too large to fill in a unit test."""
    # torchvision computes the widths of a RegNet with tensors, so its own needs real ones
    with torch.device("cpu" if architecture.startswith("regnet") else "meta"):
        return build_network(recipe, architecture, classes)


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


# --- Architectures and recipes


def test_known_architectures_are_classifiers_only() -> None:
    known = architectures()
    assert {"resnet50", "mobilenet_v2", "vit_b_16"} <= set(known)
    assert not [name for name in known if re.search("rcnn|segment|deeplab|raft|r3d", name)]


@pytest.mark.parametrize("name", ["resnet", "ResNet50", "", "fcn_resnet50", "../x"])
def test_unknown_architecture_is_refused(name: str) -> None:
    with pytest.raises(InvalidModel) as refusal:
        get_recipe(name)
    assert str(refusal.value).startswith(f"{name!r} is not a torchvision classifier; known: ")
    assert "mobilenet_v2" in str(refusal.value)


def test_recipe_by_name_or_default() -> None:
    assert str(get_recipe("resnet50")) == "ResNet50_Weights.IMAGENET1K_V2"
    v1 = "ResNet50_Weights.IMAGENET1K_V1"
    assert str(get_recipe("resnet50", v1)) == v1


@pytest.mark.parametrize(
    "name", ["", "DEFAULT", "IMAGENET1K_V1", "ResNet18_Weights.IMAGENET1K_V1", "ResNet50_Weights"]
)
def test_recipe_of_something_else_is_refused(name: str) -> None:
    with pytest.raises(InvalidModel) as refusal:
        get_recipe("resnet50", name)
    assert f"{name!r} is not a recipe of resnet50" in str(refusal.value)
    assert "ResNet50_Weights.IMAGENET1K_V2" in str(refusal.value)


# Built by the same code as their smaller siblings, and slowly: together half a minute.
LARGE = re.compile(
    "densenet16[19]|densenet201|efficientnet_b[3-7]|efficientnet_v2_[ml]|maxvit_t|resnet152"
    "|regnet_[xy]_(3_2|8|16|32|128)gf"
)


@pytest.mark.parametrize(
    "architecture", [name for name in architectures() if not LARGE.fullmatch(name)]
)
def test_every_architecture_builds_as_its_default_recipe_says(architecture: str) -> None:
    recipe = get_recipe(architecture)
    expected = recipe.meta["num_params"]
    if architecture == "inception_v3":  # its recipe counts the auxiliary head
        with torch.device("meta"):
            whole = torchvision.models.inception_v3(aux_logits=True, init_weights=False)
        expected -= parameters(whole.AuxLogits)
    network = build_empty(recipe, architecture, len(recipe.meta["categories"]))
    assert parameters(network) == expected
    assert not network.training


@pytest.mark.parametrize("architecture", architectures())
def test_every_recipe_has_classification_transforms(architecture: str) -> None:
    for recipe in torchvision.models.get_model_weights(architecture):
        transform = input_transform(recipe)
        assert recipe.meta["min_size"][0] <= transform.crop_size <= transform.resize_size
        assert transform.interpolation in ("bilinear", "bicubic")


def test_recipe_of_another_kind_is_refused() -> None:
    with pytest.raises(InvalidModel, match="has no image classification transforms"):
        input_transform(FCN_ResNet50_Weights.DEFAULT)


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("ViT_B_16_Weights.IMAGENET1K_V1", 224),
        ("ViT_B_16_Weights.IMAGENET1K_SWAG_LINEAR_V1", 224),
        ("ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1", 384),
    ],
)
def test_vit_is_built_for_the_size_of_its_recipe(name: str, side: int) -> None:
    with torch.device("meta"):
        network = build_network(get_recipe("vit_b_16", name), "vit_b_16", 5)
        logits = network(torch.zeros(2, 3, side, side))
    assert network.state_dict()["encoder.pos_embedding"].shape == (1, (side // 16) ** 2 + 1, 768)
    assert logits.shape == (2, 5)


@pytest.mark.parametrize("architecture", ["googlenet", "inception_v3"])
def test_auxiliary_heads_are_not_built(architecture: str) -> None:
    with torch.device("meta"):
        network = build_network(get_recipe(architecture), architecture, 5)
        logits = network(torch.zeros(2, 3, 299, 299))
    assert not [name for name in network.state_dict() if name.lower().startswith("aux")]
    assert logits.shape == (2, 5)


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("architecture", ["googlenet", "inception_v3"])
def test_transform_input_is_part_of_the_normalisation(architecture: str, on: bool) -> None:
    """The same answers as torchvision's own network, normalised by the recipe, gives."""
    recipe = get_recipe(architecture)
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(
        architecture, weights=None, num_classes=5, transform_input=on, init_weights=False
    ).eval()
    ours = build_network(recipe, architecture, 5)
    ours.load_state_dict({name: theirs.state_dict()[name] for name in ours.state_dict()})
    image = torch.rand(1, 3, 96, 96)
    preset, transform = recipe.transforms(), input_transform(recipe, transform_input=on)
    normalised = normalize(image, preset.mean, preset.std)
    with torch.no_grad():
        expected, given = theirs(normalised), ours(normalize(image, transform.mean, transform.std))
    assert (given - expected).abs().max() < 1e-4 * expected.abs().max()
    # What reaches the first layer, because random weights lose what it differs by.
    seen = normalize(image, transform.mean, transform.std)
    assert torch.allclose(theirs._transform_input(normalised), seen, atol=1e-6)
    assert torch.allclose(normalised, seen, atol=0.5) is not on


@pytest.mark.parametrize("architecture", ["mnasnet0_5", "mnasnet1_0", "squeezenet1_1"])
def test_plain_tensors_fill_a_network(architecture: str) -> None:
    """mnasnet asks for a version, which is lost in every dict that is not torch's own."""
    torch.manual_seed(0)
    recipe = get_recipe(architecture)
    state = dict(build_network(recipe, architecture, 3).state_dict())
    network = empty_network(recipe, architecture, 3)
    load_state(network, state)
    filled = network.state_dict()
    assert list(filled) == list(state)
    assert all(torch.equal(filled[name], state[name]) for name in state)
