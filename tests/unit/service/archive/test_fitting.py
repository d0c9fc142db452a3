"""State dicts as trainers write them, matched with architectures."""

import re

import pytest
import torch
import torchvision
from torch import Tensor, nn

from handler.errors import InvalidModel
from handler.networks import build_network, empty_network, get_recipe, load_state
from service.archive.fitting import two_outputs
from tests.unit.service.archive.state_dicts import TINY, fit, misfit, same, state_of, under

FAMILIES = (  # the smallest of each kind of last layer
    *TINY,
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v2",
    "regnet_y_400mf",
    "resnet18",
    "swin_t",
    "vgg11",
    "vit_b_32",
)


# --- Fitting


@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_state_dict_of_every_family(architecture: str) -> None:
    state = state_of(architecture, 7)
    fitted = fit(architecture, state)
    kept = {name: each for name, each in state.items() if not name.lower().startswith("aux")}
    assert same(fitted, kept)
    auxiliary = ("not used: the auxiliary heads, which are for training only",)
    assert (fitted.classes, fitted.notes) == (7, auxiliary if fitted.has_auxiliary else ())
    assert all(fitted.state[name].shape[0] == 7 for name in fitted.head)
    assert fitted.has_auxiliary == (architecture in ("googlenet", "inception_v3"))
    load_state(empty_network(get_recipe(architecture), architecture, 7), fitted.state)


def test_order_is_the_networks() -> None:
    state = state_of("squeezenet1_1")
    assert same(fit("squeezenet1_1", dict(reversed(state.items()))), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_weights_become_float32(dtype: torch.dtype) -> None:
    state = {name: tensor.to(dtype) for name, tensor in state_of("squeezenet1_1").items()}
    fitted = fit("squeezenet1_1", state)
    assert {tensor.dtype for tensor in fitted.state.values()} == {torch.float32}


def test_fitted_tensors_can_be_saved() -> None:
    """safetensors takes neither strided tensors nor those that training still follows."""
    state = state_of("squeezenet1_1")
    first = next(iter(state))
    state[first] = nn.Parameter(state[first].transpose(2, 3).contiguous().transpose(2, 3))
    given = fit("squeezenet1_1", state).state[first]
    assert given.is_contiguous()
    assert not given.requires_grad
    assert torch.equal(given, state[first])


def test_counters_of_batch_norms_may_be_missing() -> None:
    """Files older than PyTorch 0.4.1 have none."""
    state = state_of("shufflenet_v2_x0_5")
    old = {name: tensor for name, tensor in state.items() if "num_batches_tracked" not in name}
    assert len(old) < len(state)
    fitted = fit("shufflenet_v2_x0_5", old)
    assert list(fitted.state) == list(state)
    assert fitted.state["conv1.1.num_batches_tracked"] == 0


# --- Names


def test_old_names_of_densenet() -> None:
    """The files that torchvision ships still say norm.1 for norm1."""
    state = state_of("densenet121")
    old = {
        re.sub(r"(denselayer\d+\.(?:norm|relu|conv))(\d)\.", r"\1.\2.", name): tensor
        for name, tensor in state.items()
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    assert same(fit("densenet121", old), state)
    assert same(fit("densenet121", under("net.", old)), state)


def test_old_names_of_vision_transformers() -> None:
    """Those of torchvision up to 0.12, which its own files still have."""
    state = state_of("vit_b_32")
    old = {
        name.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): tensor
        for name, tensor in state.items()
    }
    assert "encoder.layers.encoder_layer_0.mlp.linear_1.weight" in old
    with torch.device("meta"):  # torchvision reads them, too
        torchvision.models.vit_b_32(num_classes=3).load_state_dict(old, assign=True)
    assert same(fit("vit_b_32", old), state)


@pytest.mark.parametrize("architecture", ["googlenet", "inception_v3"])
def test_auxiliary_heads_may_be_missing(architecture: str) -> None:
    state = state_of(architecture)
    kept = {name: each for name, each in state.items() if not name.lower().startswith("aux")}
    assert not fit(architecture, kept).has_auxiliary


@pytest.mark.parametrize(
    ("architecture", "root", "head"),
    [
        ("resnet18", "fc", nn.Sequential(nn.Dropout(), nn.Linear(512, 4))),
        ("resnet18", "fc", nn.Sequential(nn.Linear(512, 4), nn.LogSoftmax(1))),
        ("resnet18", "fc", nn.ModuleDict({"linear": nn.Linear(512, 4)})),
        ("mobilenet_v2", "classifier", nn.Linear(1280, 4)),
        ("mobilenet_v2", "classifier.1", nn.Sequential(nn.Dropout(), nn.Linear(1280, 4))),
        (
            "mobilenet_v2",
            "classifier",
            nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(1280, 4)),
        ),
        ("mobilenet_v3_small", "classifier.3", nn.Sequential(nn.Dropout(), nn.Linear(1024, 4))),
        ("densenet121", "classifier", nn.Sequential(nn.Dropout(), nn.Linear(1024, 4))),
        ("vit_b_32", "heads", nn.Linear(768, 4)),
        ("alexnet", "classifier.6", nn.Sequential(nn.Dropout(), nn.Linear(4096, 4))),
    ],
)
@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_last_layer_that_was_replaced(
    architecture: str, root: str, head: nn.Module, prefix: str
) -> None:
    state = state_of(architecture)
    replaced = {name: each for name, each in state.items() if not f"{name}.".startswith(f"{root}.")}
    replaced |= under(f"{root}.", dict(head.state_dict()))
    fitted = fit(architecture, under(prefix, replaced))
    assert fitted.classes == 4
    weight, bias = (fitted.state[name] for name in fitted.head)
    (linear,) = (layer for layer in head.modules() if isinstance(layer, nn.Linear))
    assert torch.equal(weight, linear.weight)
    assert torch.equal(bias, linear.bias)
    assert "layers without weights beside it, such as Dropout" in fitted.notes[-1] or (
        list(replaced)[-2:] == list(state)[-2:]
    )


def test_a_last_layer_that_became_several_is_refused() -> None:
    state = {name: each for name, each in state_of("resnet18").items() if "fc." not in name}
    head = nn.Sequential(nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 4))
    message = misfit("resnet18", state | under("fc.", dict(head.state_dict())))
    assert message.startswith(
        "does not fit resnet18: fc is several layers in the file (fc.0.weight, fc.2.weight), "
        "not one"
    )


# --- One output


@pytest.mark.parametrize("architecture", ["resnet18", "squeezenet1_1"])
def test_one_output_is_answered_by_its_sigmoid(architecture: str) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(architecture, num_classes=1).eval()
    fitted = fit(architecture, dict(theirs.state_dict()))
    assert fitted.classes == 1
    two = two_outputs(fitted, ["cat", "dog"])
    assert (two.classes, list(two.state)) == (2, list(fitted.state))
    assert two.notes[-1] == (
        "it has one output: its sigmoid is the confidence of class 1, 'dog', and the rest to 1.0 "
        "that of class 0, 'cat'"
    )
    ours = build_network(get_recipe(architecture), architecture, 2)
    ours.load_state_dict(two.state)
    images = torch.rand(3, 3, 96, 96)
    with torch.no_grad():
        yes = theirs(images).sigmoid()
        answers = ours(images).softmax(1)
    assert torch.allclose(answers, torch.cat([1 - yes, yes], 1), atol=1e-6)
    assert 0.001 < yes.min() < 0.999


@pytest.mark.parametrize("labels", [["dog"], ["a", "b", "c"], ["x"] * 1000])
def test_one_output_without_two_names_is_refused(labels: list[str]) -> None:
    with pytest.raises(InvalidModel) as refusal:
        two_outputs(fit("squeezenet1_1", state_of("squeezenet1_1", 1)), labels)
    assert "its confidence is 1.0 for every image" in str(refusal.value)
    assert "give --labels with two names" in str(refusal.value)


# --- Refusals


def test_missing_tensor_is_named() -> None:
    state = state_of("squeezenet1_1")
    del state["features.3.squeeze.bias"]
    message = (
        "does not fit squeezenet1_1: features.3.squeeze.bias is missing; nearest in the file: "
    )
    assert misfit("squeezenet1_1", state).startswith(f"{message}features.")


def test_the_nearest_names_are_shown() -> None:
    state = state_of("resnet18")
    table = under("model.", {name: each for name, each in state.items() if "fc." not in name})
    table |= {"model.fc_out.weight": torch.ones(3, 512), "model.fc_out.bias": torch.ones(3)}
    message = misfit("resnet18", {"state_dict": table})
    assert message.startswith("does not fit resnet18: fc.weight is missing (and 3 more); nearest")
    assert "state_dict.model.fc_out.weight" in message


def test_a_foreign_state_dict_is_refused_with_its_names() -> None:
    message = misfit("resnet18", {"w1": torch.zeros(2), "w2": torch.zeros(2)})
    assert re.fullmatch(
        r"does not fit resnet18: conv1.weight is missing \(and \d+ more\); nearest in the file: "
        "w1, w2",
        message,
    )


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({"extra.weight": [1]}, "extra.weight is not part of it"),
        ({"features.0.bias": [3, 5]}, "features.0.bias has shape [3, 5], squeezenet1_1 has [64]"),
        (
            {"features.0.bias": [3], "features.3.squeeze.bias": [3]},
            "features.0.bias has shape [3], squeezenet1_1 has [64] (and 1 more)",
        ),
        (
            {"classifier.1.weight": []},
            "classifier.1.weight has shape [], squeezenet1_1 has [2, 512, 1, 1] (and 1 more)",
        ),
    ],
)
def test_what_does_not_fit_is_named(tensors: dict[str, list[int]], problem: str) -> None:
    state = state_of("squeezenet1_1")
    state |= {name: torch.zeros(shape) for name, shape in tensors.items()}
    assert misfit("squeezenet1_1", state) == f"does not fit squeezenet1_1: {problem}"


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(64, dtype=torch.complex64),
        torch.zeros(64).to_sparse(),
        torch.zeros(64, device="meta"),
        torch.quantize_per_tensor(torch.zeros(64), 0.1, 0, torch.qint8),
    ],
    ids=["complex", "sparse", "meta", "quantized"],
)
def test_tensors_of_other_kinds_are_refused(tensor: Tensor) -> None:
    message = misfit("squeezenet1_1", state_of("squeezenet1_1") | {"features.0.bias": tensor})
    assert "features.0.bias is complex, quantized, sparse or without data" in message


@pytest.mark.parametrize("value", [float("nan"), -float("inf"), 1e300])
def test_what_is_no_number_is_refused_by_name(value: float) -> None:
    state = state_of("shufflenet_v2_x0_5")
    bias = torch.zeros(24, dtype=torch.float64)
    bias[3] = value
    message = misfit("shufflenet_v2_x0_5", state | {"conv1.1.bias": bias})
    assert message.startswith("conv1.1.bias holds 1 numbers of 24 that are NaN or infinite: ")
    assert message.endswith("take an earlier checkpoint")


def test_negative_variances_are_refused_by_name() -> None:
    state = state_of("shufflenet_v2_x0_5") | {"conv1.1.running_var": -torch.ones(24)}
    assert "conv1.1.running_var holds negative variances" in misfit("shufflenet_v2_x0_5", state)
