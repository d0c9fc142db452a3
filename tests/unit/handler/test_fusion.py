"""Rewritten networks: the same answers with fewer calls, and what must not be rewritten."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

import handler.fusion
from handler.fusion import FusedConvolution, difference, fold_batch_norms, fuse_relus
from handler.networks import build_network, get_recipe, input_transform
from tests.unit.handler.conftest import Logged
from tests.unit.handler.test_engines import TRANSFORM
from tests.unit.tiny import tiny_network

SMALL = replace(TRANSFORM, crop_size=16)


def trained(architecture: str) -> nn.Module:
    """Seeded, with batch norms as if trained: fresh ones change nothing."""
    torch.manual_seed(0)
    network = build_network(get_recipe(architecture), architecture, 5)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in [
                (module.running_mean, -0.1, 0.1),
                (module.running_var, 0.5, 1.5),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.1, 0.1),
            ]:
                assert tensor is not None
                tensor.uniform_(low, high)
    return network


def count(network: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in network.modules())


def added(network: fx.GraphModule) -> int:
    """Fused convolutions that are given a residual."""
    calls = [node for node in network.graph.nodes if str(node.target).startswith("fused_")]
    return sum(len(node.args) == 2 for node in calls)


# --- torchvision's networks

# Convolutions, those fused, and those of them that add a residual.
NETWORKS = {
    "alexnet": (5, 5, 0),
    "convnext_tiny": (22, 0, 0),  # GELU
    "densenet121": (120, 59, 0),
    "efficientnet_b0": (81, 0, 0),  # SiLU
    "googlenet": (57, 57, 0),
    "mnasnet0_5": (52, 18, 0),  # the others are depthwise, or have no ReLU
    "mobilenet_v2": (52, 0, 0),  # ReLU6
    "mobilenet_v3_large": (62, 13, 0),  # Hardswish, but for some
    "regnet_x_400mf": (71, 67, 22),
    "regnet_y_400mf": (85, 65, 16),
    "resnet18": (20, 17, 8),
    "resnet50": (53, 49, 16),
    "resnext50_32x4d": (53, 49, 16),
    "shufflenet_v2_x1_0": (56, 37, 0),
    "squeezenet1_1": (26, 26, 0),
    "vgg11_bn": (8, 8, 0),
}


@pytest.mark.parametrize("architecture", NETWORKS)
def test_rewritten_networks_compute_the_same(architecture: str, logged: Logged) -> None:
    network = trained(architecture)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    transform = replace(input_transform(get_recipe(architecture)), crop_size=96)
    folded = fold_batch_norms(network, transform)
    fused = fuse_relus(folded, transform)
    convolutions, fusions, adds = NETWORKS[architecture]
    assert count(fused, nn.Conv2d) == convolutions
    assert count(fused, FusedConvolution) == fusions
    assert isinstance(fused, fx.GraphModule)
    assert added(fused) == adds
    assert (fused is folded) is (fusions == 0)
    images = torch.randn(3, 3, transform.crop_size, transform.crop_size)
    with torch.inference_mode():
        expected = network(images).softmax(1)
        for rewritten in (folded, fused):
            given = rewritten(images).softmax(1)
            torch.testing.assert_close(given, expected, rtol=0, atol=1e-5)
    # In DenseNet half of the norms come before their convolution, and stay.
    assert count(folded, nn.BatchNorm2d) == (62 if architecture == "densenet121" else 0)
    assert all(torch.equal(network.state_dict()[name], before[name]) for name in before)
    assert logged() == []


def test_a_fused_network_shares_the_weights() -> None:
    folded = fold_batch_norms(tiny_network(), TRANSFORM)
    own = {weight.data_ptr() for weight in folded.parameters()}
    assert {weight.data_ptr() for weight in fuse_relus(folded, TRANSFORM).parameters()} == own


# --- What is fused, and what is not


class Net(nn.Module):
    """Two convolutions and a residual in a way of its own, then the mean: [B, 3, 16, 16] in."""

    def __init__(self, forward: Callable[["Net", Tensor], Tensor], **options: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Conv2d(3, 4, 3, padding=1)
        self.two = nn.Conv2d(4, 4, 3, **{"padding": 1} | options)  # type: ignore[arg-type]
        self.relu, self.relu_in_place = nn.ReLU(), nn.ReLU(inplace=True)
        self.own_forward = forward

    def forward(self, images: Tensor) -> Tensor:
        return self.own_forward(self, images).mean(dim=(2, 3))


def fused_in(network: nn.Module) -> tuple[int, int]:
    """How many convolutions were fused and how many of them add; the answers are the same."""
    folded = fold_batch_norms(network.eval(), SMALL)
    fused = fuse_relus(folded, SMALL)
    images = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(fused(images.clone()), network(images.clone()))
    assert isinstance(fused, fx.GraphModule)
    return count(fused, FusedConvolution), added(fused)


RELUS: list[Callable[[Net, Tensor], Tensor]] = [
    lambda net, x: net.relu(x),
    lambda net, x: net.relu_in_place(x),
    lambda _, x: functional.relu(x),
    lambda _, x: functional.relu(x, inplace=True),
    lambda _, x: torch.relu(x),
    lambda _, x: torch.relu_(x),
    lambda _, x: x.relu(),
    lambda _, x: x.relu_(),
]


@pytest.mark.parametrize("relu", RELUS)
def test_every_relu(relu: Callable[[Net, Tensor], Tensor], logged: Logged) -> None:
    assert fused_in(Net(lambda net, x: relu(net, net.two(relu(net, net.one(x)))))) == (2, 0)
    assert logged() == []


def in_place(left: Tensor, right: Tensor) -> Tensor:
    left += right
    return left


ADDS: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda a, b: a + b,
    in_place,
    lambda a, b: torch.add(a, b),
    lambda a, b: a.add(b),
    lambda a, b: a.add_(b),
]


@pytest.mark.parametrize("add", ADDS)
@pytest.mark.parametrize("relu", RELUS)
def test_every_add(
    add: Callable[[Tensor, Tensor], Tensor], relu: Callable[[Net, Tensor], Tensor], logged: Logged
) -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.relu(net.one(x))
        return relu(net, add(net.two(x), x))

    assert fused_in(Net(forward)) == (2, 1)
    assert logged() == []


def residual_first(net: Net, x: Tensor) -> Tensor:
    x = net.relu(net.one(x))
    return net.relu_in_place(x + net.two(x))


def residual_computed_later(net: Net, x: Tensor) -> Tensor:
    one = net.one(x.flip(2))
    return (one + x.mean(dim=1, keepdim=True).expand(-1, 4, -1, -1).sin()).relu()


def two_convolutions(net: Net, x: Tensor) -> Tensor:
    x = net.relu(net.one(x))
    return net.relu(net.two(x) + net.two(x.flip(2)))


@pytest.mark.parametrize(
    ("forward", "fused"),
    [(residual_first, (2, 1)), (residual_computed_later, (1, 1)), (two_convolutions, (2, 1))],
)
def test_residuals_in_any_place(
    forward: Callable[[Net, Tensor], Tensor], fused: tuple[int, int], logged: Logged
) -> None:
    assert fused_in(Net(forward)) == fused
    assert logged() == []


def written_after(net: Net, x: Tensor) -> Tensor:
    """The input of the convolution is another one when the sum is computed."""
    x = x * 2
    one = net.one(x)
    return (one + x.relu_().mean(dim=1, keepdim=True).expand(-1, 4, -1, -1).sin()).relu()


def residual_is_written(net: Net, x: Tensor) -> Tensor:
    x = net.one(x)
    return torch.cat([x.add_(net.two(x)).relu(), x])


NOT_FUSED: list[Callable[[Net, Tensor], Tensor]] = [
    lambda net, x: functional.relu6(net.one(x)),
    lambda net, x: functional.silu(net.one(x)),
    lambda net, x: functional.leaky_relu(net.one(x)),
    lambda net, x: torch.cat([(one := net.one(x)).relu(), one]),  # somebody else reads it
    lambda net, x: torch.cat([(two := net.one(x) + x[:, :1].expand(-1, 4, -1, -1)).relu(), two]),
    lambda net, x: (net.one(x) + 1).relu(),
    lambda net, x: (net.one(x) + x[:1, :1]).relu(),  # both are broadcast
    lambda net, x: (net.one(x) + x[:, :1]).relu(),
    lambda net, x: torch.add(net.one(x), x[:, :1].expand(-1, 4, -1, -1), alpha=2).relu(),
    lambda net, x: ((one := net.one(x)) + one).relu(),
    lambda net, x: (net.one(x) - x[:, :1].expand(-1, 4, -1, -1)).relu(),
    written_after,
    residual_is_written,
]


@pytest.mark.parametrize("forward", NOT_FUSED)
def test_what_is_not_fused(forward: Callable[[Net, Tensor], Tensor], logged: Logged) -> None:
    assert fused_in(Net(forward)) == (0, 0)
    assert logged() == []


@pytest.mark.parametrize(
    ("options", "fused"),
    [
        ({"bias": False}, 1),
        ({"groups": 2, "dilation": 2, "padding": 2, "stride": 2}, 1),
        ({"groups": 4}, 0),  # depthwise
        ({"padding": "same"}, 0),
        ({"padding_mode": "reflect"}, 0),
    ],
)
def test_kinds_of_convolutions(options: dict[str, object], fused: int, logged: Logged) -> None:
    assert fused_in(Net(lambda net, x: net.two(net.one(x)).relu(), **options)) == (fused, 0)
    assert logged() == []


# --- What fails


class Branching(nn.Module):
    """Cannot be traced: what it does depends on what it sees."""

    def forward(self, images: Tensor) -> Tensor:
        if images.sum() > 0:
            return images.mean(dim=(2, 3))
        return images.amax(dim=(2, 3))


def test_a_network_that_cannot_be_traced_stays_as_it_is() -> None:
    network = Branching()
    assert fold_batch_norms(network, TRANSFORM) is network
    assert fuse_relus(network, TRANSFORM) is network


def test_a_fold_that_changes_the_answers_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handler.fusion, "fuse", lambda _: Branching())
    network = tiny_network()
    assert fold_batch_norms(network, TRANSFORM) is network


def through_a_view(net: Net, x: Tensor) -> Tensor:
    """The input changes between convolution and add, which the graph does not show."""
    x = x * 2
    view = x.view(x.shape)
    return (net.one(x) + view.relu_().mean(dim=1, keepdim=True).expand(-1, 4, -1, -1)).relu()


def test_a_fusion_that_changes_the_answers_is_not_taken(logged: Logged) -> None:
    network = fold_batch_norms(Net(through_a_view).eval(), SMALL)
    assert fuse_relus(network, SMALL) is network
    (line,) = logged()
    assert line["event"] == "not_fused"
    assert line["reason"].startswith("it moves 0.")


@pytest.mark.parametrize(
    ("actual", "moved"),
    [
        ([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]], 0),
        ([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]], 0.25),
        ([[0.0, 0.0, 1.0], [0.2, 0.3, 0.5]], 1),
    ],
)
def test_difference(actual: list[list[float]], moved: float) -> None:
    expected = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
    assert difference(expected, torch.tensor(actual)) == pytest.approx(moved)


def test_difference_of_a_nan_is_under_no_limit() -> None:
    given = torch.tensor([[torch.nan, 0.5], [0.5, 0.5]])
    assert not difference(torch.full((2, 2), 0.5), given) <= 1


# --- On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_cudnn_computes_what_the_calls_do(bias: bool, groups: int) -> None:
    """In memory that is full of NaN before, as its own result is a residual times zero."""
    torch.manual_seed(0)
    own = nn.Conv2d(64, 64, 3, padding=2, dilation=2, groups=groups, bias=bias).half()
    images, residual = torch.randn(2, 2, 64, 56, 56).half()
    expected = own(images)
    fused = FusedConvolution(own).cuda().to(memory_format=torch.channels_last)
    given = images.cuda().to(memory_format=torch.channels_last)
    with torch.inference_mode():
        torch.cuda.empty_cache()
        full = torch.full((2**26,), torch.nan, dtype=torch.half, device="cuda")
        del full
        alone = fused(given)
        both = fused(given, residual.cuda())
    assert fused.refusal is None or groups > 1
    torch.testing.assert_close(alone.cpu(), expected.relu(), rtol=0.01, atol=0.01)
    torch.testing.assert_close(both.cpu(), (expected + residual).relu(), rtol=0.01, atol=0.01)
