"""State dicts as trainers write them, held against architectures."""

import re
from functools import cache
from typing import Any, cast

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from handler.errors import InvalidModel
from handler.networks import build_network, empty_network, get_recipe, load_state
from service.archive.checkpoints import Checkpoint
from service.archive.fitting import Fit, fit_checkpoint, two_outputs

TINY = ("squeezenet1_1", "mobilenet_v3_small", "shufflenet_v2_x0_5")
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


# --- Fitting


@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_state_dict_of_every_family(architecture: str) -> None:
    state = state_of(architecture, 7)
    fitted = fit(architecture, state)
    wanted = {
        name: tensor for name, tensor in state.items() if not re.match(r"aux\d|AuxLogits", name)
    }
    assert same(fitted, wanted)
    auxiliary = ("not used: the auxiliary heads, which are for training only",)
    assert (fitted.classes, fitted.notes) == (7, auxiliary if fitted.has_auxiliary else ())
    assert all(fitted.state[name].shape[0] == 7 for name in fitted.head)
    assert fitted.has_auxiliary == (architecture in ("googlenet", "inception_v3"))
    load_state(empty_network(get_recipe(architecture), architecture, 7), fitted.state)


@pytest.mark.parametrize("classes", [1, 2, 3, 1000])
def test_class_count_of_any_number(classes: int) -> None:
    state = state_of("squeezenet1_1", 3)
    state |= {
        "classifier.1.weight": torch.zeros(classes, 512, 1, 1),
        "classifier.1.bias": torch.zeros(classes),
    }
    assert fit("squeezenet1_1", state).classes == classes


def test_order_is_the_networks() -> None:
    state = state_of("squeezenet1_1")
    assert same(fit("squeezenet1_1", dict(reversed(state.items()))), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
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


# --- Prefixes


PREFIXES = "module. _orig_mod. module._orig_mod. module.module. model. net. backbone. model.model. "
PREFIXES += "model._orig_mod. a.b.c."


@pytest.mark.parametrize("prefix", PREFIXES.split())
@pytest.mark.parametrize("architecture", [*TINY, "resnet18"])
def test_any_prefix_that_makes_the_names_fit_is_taken_off(architecture: str, prefix: str) -> None:
    state = state_of(architecture)
    fitted = fit(architecture, under(prefix, state))
    assert same(fitted, state)
    assert fitted.notes == (f"the weights are those under {prefix!r}",)


def test_real_wrappers_are_taken_off() -> None:
    network = torchvision.models.squeezenet1_1(num_classes=3)
    state = dict(network.state_dict())
    for wrapped in (
        nn.DataParallel(nn.DataParallel(network)),
        AveragedModel(network, use_buffers=True),  # n_averaged beside module.
        cast(nn.Module, torch.compile(network)),
        nn.ModuleDict({"net": network}),
    ):
        assert same(fit("squeezenet1_1", dict(wrapped.state_dict())), state)


def test_what_averaged_model_counts_is_named_as_left_out() -> None:
    network = torchvision.models.squeezenet1_1(num_classes=3)
    state = dict(AveragedModel(network).state_dict())
    assert fit("squeezenet1_1", state).notes == (
        "the weights are those under 'module.'",
        "not used: n_averaged",
    )


def test_wrappers_in_the_middle_of_names() -> None:
    """As PyTorch's ImageNet example wraps alexnet and vgg: their features alone."""
    state = state_of("squeezenet1_1")
    wrapped = {
        name.replace("features.", "features.module.", 1): each for name, each in state.items()
    }
    assert same(fit("squeezenet1_1", wrapped), state)
    assert same(fit("squeezenet1_1", under("model.", wrapped)), state)


def test_a_lightning_checkpoint() -> None:
    """The model in an attribute; the loss's weights and metrics' counts beside it."""
    state = state_of("resnet18")
    table = under("net.", state) | {
        "criterion.weight": torch.ones(3),
        "val_acc.tp": torch.zeros(3, dtype=torch.int64),
        "val_matrix.confmat": torch.zeros(3, 3, dtype=torch.int64),
    }
    entries = ("loops", "callbacks", "optimizer_states", "state_dict")
    fitted = fit("resnet18", {"state_dict": table}, entries=entries)
    assert same(fitted, state)
    assert fitted.notes == (
        "the weights are those under 'state_dict.net.'",
        "not used: loops, callbacks, optimizer_states, state_dict.criterion.weight, "
        "state_dict.val_acc.tp and 1 more",
    )


def test_a_second_head_is_not_dropped() -> None:
    """It may be what the answers come from: the user says that it is not."""
    state = state_of("resnet18")
    table = under("net.", state) | {"head.weight": torch.ones(5, 3), "head.bias": torch.ones(5)}
    message = misfit("resnet18", {"state_dict": table})
    assert "state_dict.head.weight [5, 3] beside the resnet18 under 'state_dict.net.'" in message
    assert "say --weights-prefix 'state_dict.net'" in message
    fitted = fit("resnet18", {"state_dict": table}, "state_dict.net")
    assert same(fitted, state)
    assert fitted.notes[-1] == "not used: state_dict.head.weight, state_dict.head.bias"


def test_a_larger_sibling_is_refused() -> None:
    """resnet34 has all names and shapes of resnet18, and more."""
    assert "is not part of it" in misfit("resnet18", state_of("resnet34"))
    assert "is not part of it" in misfit("resnet18", under("model.", state_of("resnet34")))


# --- Several sets of weights


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("model", "model_ema.module"),  # torchvision's references
        ("state_dict", "state_dict_ema"),  # timm
        ("state_dict.model", "state_dict.ema_model"),  # one dict, two attributes
        ("state_dict.student", "state_dict.teacher"),
        ("state_dict", "current_model_state.model"),
    ],
)
def test_several_that_fit_are_a_choice(first: str, second: str) -> None:
    state = state_of("squeezenet1_1")
    average = other(state)
    tables: dict[str, dict[str, Tensor]] = {}
    for place, tensors in ((first, state), (second, average)):
        key, _, prefix = place.partition(".")
        tables.setdefault(key, {}).update(under(f"{prefix}." if prefix else "", tensors))
    assert misfit("squeezenet1_1", tables) == (
        "holds 2 different sets of weights that fit squeezenet1_1; choose one: "
        f"--weights-prefix {first!r} or --weights-prefix {second!r}"
    )
    assert same(fit("squeezenet1_1", tables, first), state)
    assert same(fit("squeezenet1_1", tables, f"{second}."), average)
    message = misfit("squeezenet1_1", tables, "modle")
    assert (
        f"--weights-prefix modle: no such prefix; those that fit: '{first}.', '{second}.'"
        in message
    )


def test_the_beginning_of_one_prefix_alone_will_do() -> None:
    state = state_of("squeezenet1_1")
    tables = {"model": state, "model_ema": under("module.", other(state))}
    assert same(fit("squeezenet1_1", tables, "model_ema"), other(state))
    tables = {"ema": under("a.", state) | under("b.", other(state))}
    assert "no such prefix; those that fit: 'ema.a.', 'ema.b.'" in misfit(
        "squeezenet1_1", tables, "ema"
    )


def test_equal_weights_are_no_choice() -> None:
    state = state_of("squeezenet1_1")
    copies = {name: tensor.clone() for name, tensor in state.items()}
    assert same(fit("squeezenet1_1", {"model": state, "model_ema": copies}), state)


def test_a_module_under_two_names_is_no_choice() -> None:
    """As Lightning writes `self.model = self.net = network`."""
    state = state_of("squeezenet1_1")
    table = under("model.", state) | under("net.", state)
    assert same(fit("squeezenet1_1", {"state_dict": table}), state)


def test_the_one_that_fits_is_no_choice() -> None:
    tables = {"teacher": state_of("resnet34"), "student": state_of("resnet18")}
    assert same(fit("resnet18", tables), state_of("resnet18"))
    assert same(fit("resnet34", tables), state_of("resnet34"))


def test_averages_without_names_are_named_as_left_out() -> None:
    fitted = fit("squeezenet1_1", {"model": state_of("squeezenet1_1")}, entries=("model", "ema"))
    assert fitted.notes[-1] == "not used: ema"


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
def test_auxiliary_heads_are_dropped(architecture: str) -> None:
    state = state_of(architecture)
    kept = {name: each for name, each in state.items() if not name.lower().startswith("aux")}
    assert len(kept) < len(state)
    assert same(fit(architecture, under("model.", state)), kept)
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
    assert misfit("squeezenet1_1", state).startswith(
        "does not fit squeezenet1_1: features.3.squeeze.bias is missing; nearest in the file: "
        "features."
    )


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


def test_tensor_too_many_is_named() -> None:
    state = state_of("squeezenet1_1") | {"extra.weight": torch.zeros(1)}
    assert misfit("squeezenet1_1", state) == (
        "does not fit squeezenet1_1: extra.weight is not part of it"
    )


def test_wrong_shape_is_named_with_both() -> None:
    state = state_of("squeezenet1_1") | {"features.0.bias": torch.zeros(3, 5)}
    assert misfit("squeezenet1_1", state) == (
        "does not fit squeezenet1_1: features.0.bias has shape [3, 5], squeezenet1_1 has [64]"
    )


def test_first_of_several_is_named_and_the_others_counted() -> None:
    state = state_of("squeezenet1_1") | {
        "features.0.bias": torch.zeros(3),
        "features.3.squeeze.bias": torch.zeros(3),
    }
    assert misfit("squeezenet1_1", state) == (
        "does not fit squeezenet1_1: features.0.bias has shape [3], squeezenet1_1 has [64] "
        "(and 1 more)"
    )


def test_a_last_layer_without_shape_is_refused() -> None:
    state = state_of("squeezenet1_1") | {"classifier.1.weight": torch.tensor(1.0)}
    assert "classifier.1.weight has shape []" in misfit("squeezenet1_1", state)


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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
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
