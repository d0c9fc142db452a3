"""State dicts under prefixes, and several in one file: which is meant, and what is refused."""

from typing import cast

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from tests.unit.service.archive.state_dicts import TINY, fit, misfit, other, same, state_of, under


@pytest.mark.parametrize("prefix", ["module.", "model._orig_mod.", "module.module.", "a.b.c."])
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
        fitted = fit("squeezenet1_1", dict(wrapped.state_dict()))
        assert same(fitted, state)
        assert fitted.notes[1:] == (
            ("not used: n_averaged",) if isinstance(wrapped, AveragedModel) else ()
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
