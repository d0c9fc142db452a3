"""torchvision's classifiers: found, built, measured, and held against state dicts."""

import re

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import WeightsEnum
from torchvision.models.segmentation import FCN_ResNet50_Weights

from handler.errors import InvalidModel
from handler.networks import (
    architectures,
    build_network,
    class_count,
    clean_state_dict,
    fit_state_dict,
    get_recipe,
    input_transform,
)

TINY = ("squeezenet1_1", "mobilenet_v3_small", "shufflenet_v2_x0_5")
FAMILIES = (  # the smallest of each kind of last layer
    *TINY,
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "inception_v3",
    "mnasnet0_5",
    "mobilenet_v2",
    "regnet_y_400mf",
    "resnet18",
    "swin_t",
    "vgg11",
    "vit_b_32",
)


def state_of(architecture: str, classes: int = 3) -> dict[str, Tensor]:
    """Seeded random weights as torchvision itself would save them."""
    torch.manual_seed(0)
    network = torchvision.models.get_model(architecture, weights=None, num_classes=classes)
    return dict(network.state_dict())


def build_empty(recipe: WeightsEnum, architecture: str, classes: int) -> nn.Module:
    """Names and shapes alone, since most networks are too large to fill in a unit test."""
    # torchvision computes the widths of a RegNet with tensors, so its own needs real ones
    with torch.device("cpu" if architecture.startswith("regnet") else "meta"):
        return build_network(recipe, architecture, classes)


def shapes_of(architecture: str, classes: int) -> dict[str, Tensor]:
    return dict(build_empty(get_recipe(architecture), architecture, classes).state_dict())


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
    wanted = recipe.meta["num_params"]
    if architecture == "inception_v3":  # its recipe counts the auxiliary head
        with torch.device("meta"):
            whole = torchvision.models.inception_v3(aux_logits=True, init_weights=False)
        wanted -= parameters(whole.AuxLogits)
    network = build_empty(recipe, architecture, len(recipe.meta["categories"]))
    assert parameters(network) == wanted
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
    assert network.transform_input  # as torchvision sets it for pretrained weights


# --- Number of classes


@pytest.mark.parametrize("architecture", FAMILIES)
def test_class_count_of_every_family(architecture: str) -> None:
    state = shapes_of(architecture, 7)
    assert class_count(state, get_recipe(architecture), architecture) == 7


@pytest.mark.parametrize("classes", [1, 2, 3, 1000])
def test_class_count_of_any_number(classes: int) -> None:
    state = shapes_of("squeezenet1_1", classes)
    assert class_count(state, get_recipe("squeezenet1_1"), "squeezenet1_1") == classes


def test_class_count_of_a_foreign_state_dict() -> None:
    recipe = get_recipe("mobilenet_v2")
    with pytest.raises(InvalidModel) as refusal:
        class_count({"fc.weight": torch.zeros(3, 8)}, recipe, "mobilenet_v2")
    assert str(refusal.value) == "does not fit mobilenet_v2: classifier.1.weight is missing"


def test_class_count_of_a_last_layer_without_shape() -> None:
    state = {"classifier.1.weight": torch.tensor(1.0), "classifier.1.bias": torch.tensor(1.0)}
    with pytest.raises(InvalidModel):
        class_count(state, get_recipe("mobilenet_v2"), "mobilenet_v2")


# --- Names


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "module." * 2])
@pytest.mark.parametrize("architecture", TINY)
def test_prefixes_of_wrappers_are_taken_off(architecture: str, prefix: str) -> None:
    state = state_of(architecture)
    wrapped = {prefix + name: tensor for name, tensor in state.items()}
    assert list(clean_state_dict(wrapped, architecture)) == list(state)


def test_a_real_wrapper_is_unwrapped() -> None:
    network = torchvision.models.squeezenet1_1(num_classes=3)
    wrapped = nn.DataParallel(nn.DataParallel(network)).state_dict()
    assert set(clean_state_dict(wrapped, "squeezenet1_1")) == set(network.state_dict())


def test_only_leading_prefixes_are_taken_off() -> None:
    state = {"backbone.module.weight": torch.zeros(1), "modules.weight": torch.zeros(1)}
    assert clean_state_dict(state, "resnet18") == state


def test_old_names_of_densenet() -> None:
    """The files that torchvision ships still say norm.1 for norm1."""
    state = shapes_of("densenet121", 3)
    old = {
        re.sub(r"(denselayer\d+\.(?:norm|relu|conv))(\d)\.", r"\1.\2.", name): tensor
        for name, tensor in state.items()
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    assert list(clean_state_dict(old, "densenet121")) == list(state)
    assert list(clean_state_dict(state, "densenet121")) == list(state)


@pytest.mark.parametrize("architecture", ["googlenet", "inception_v3"])
def test_auxiliary_heads_are_dropped(architecture: str) -> None:
    with torch.device("meta"):
        whole = torchvision.models.get_model(
            architecture, weights=None, num_classes=3, aux_logits=True, init_weights=False
        ).state_dict()
    kept = clean_state_dict(whole, architecture)
    assert list(kept) == list(shapes_of(architecture, 3))
    assert len(kept) < len(whole)


# --- Fitting


@pytest.mark.parametrize("architecture", [*TINY, "regnet_y_400mf"])
def test_a_fitting_state_dict_is_taken_whole(architecture: str) -> None:
    state = state_of(architecture)
    fitted = fit_state_dict(state, get_recipe(architecture), architecture, 3)
    assert list(fitted) == list(state)
    assert all(torch.equal(fitted[name], state[name]) for name in state)
    network = build_network(get_recipe(architecture), architecture, 3)
    network.load_state_dict(fitted)  # strict


def test_order_is_the_networks() -> None:
    state = state_of("squeezenet1_1")
    shuffled = dict(reversed(state.items()))
    fitted = fit_state_dict(shuffled, get_recipe("squeezenet1_1"), "squeezenet1_1", 3)
    assert list(fitted) == list(state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_become_float32(dtype: torch.dtype) -> None:
    state = {name: tensor.to(dtype) for name, tensor in state_of("squeezenet1_1").items()}
    fitted = fit_state_dict(state, get_recipe("squeezenet1_1"), "squeezenet1_1", 3)
    assert {tensor.dtype for tensor in fitted.values()} == {torch.float32}


def test_fitted_tensors_can_be_saved() -> None:
    """safetensors takes neither strided tensors nor those that training still follows."""
    state = state_of("squeezenet1_1")
    first = next(iter(state))
    state[first] = nn.Parameter(state[first].transpose(2, 3).contiguous().transpose(2, 3))
    fitted = fit_state_dict(state, get_recipe("squeezenet1_1"), "squeezenet1_1", 3)
    assert fitted[first].is_contiguous()
    assert not fitted[first].requires_grad
    assert torch.equal(fitted[first], state[first])


def test_counters_of_batch_norms_may_be_missing() -> None:
    """Files older than PyTorch 0.4.1 have none."""
    state = state_of("shufflenet_v2_x0_5")
    old = {name: tensor for name, tensor in state.items() if "num_batches_tracked" not in name}
    assert len(old) < len(state)
    recipe = get_recipe("shufflenet_v2_x0_5")
    fitted = fit_state_dict(old, recipe, "shufflenet_v2_x0_5", 3)
    assert list(fitted) == list(state)
    assert fitted["conv1.1.num_batches_tracked"] == 0


def misfit(state: dict[str, Tensor], classes: int = 3) -> str:
    with pytest.raises(InvalidModel) as refusal:
        fit_state_dict(state, get_recipe("squeezenet1_1"), "squeezenet1_1", classes)
    return str(refusal.value)


def test_missing_tensor_is_named() -> None:
    state = state_of("squeezenet1_1")
    del state["features.3.squeeze.bias"]
    assert misfit(state) == "does not fit squeezenet1_1: features.3.squeeze.bias is missing"


def test_tensor_too_many_is_named() -> None:
    state = state_of("squeezenet1_1") | {"extra.weight": torch.zeros(1)}
    assert misfit(state) == "does not fit squeezenet1_1: extra.weight is not part of it"


def test_wrong_shape_is_named_with_both() -> None:
    state = state_of("squeezenet1_1") | {"features.0.bias": torch.zeros(3, 5)}
    assert misfit(state) == (
        "does not fit squeezenet1_1: features.0.bias has shape [3, 5], squeezenet1_1 has [64]"
    )


def test_first_of_several_is_named_and_the_others_counted() -> None:
    state = state_of("squeezenet1_1", classes=5)
    assert misfit(state) == (
        "does not fit squeezenet1_1: classifier.1.weight has shape [5, 512, 1, 1], "
        "squeezenet1_1 has [3, 512, 1, 1] (and 1 more)"
    )


def test_another_architecture_is_refused() -> None:
    assert misfit(state_of("shufflenet_v2_x0_5")).startswith(
        "does not fit squeezenet1_1: features.0.weight is missing (and "
    )


def test_nothing_fits_nothing() -> None:
    assert "features.0.weight is missing" in misfit({})
