"""A network as GPUs run it fastest: batch norms folded, ReLU and residual adds in convolutions.

What is rewritten is compared with what it was made of, so that a rewrite that is wrong is not used.
"""

import operator
from collections.abc import Iterator
from contextlib import suppress
from copy import deepcopy
from logging import WARNING
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional

from handler.logs import log_line
from handler.model_card import InputTransform

MAX_DIFFERENCE = 1e-3  # see `difference`; float32 differs by some 1e-6

RELUS = (functional.relu, torch.relu, torch.relu_)
RELU_METHODS = ("relu", "relu_")
ADDS = (operator.add, operator.iadd, torch.add)
ADD_METHODS = ("add", "add_")
ADDS_IN_PLACE = (operator.iadd, "add_")


def difference(expected: Tensor, actual: Tensor) -> float:
    """The share of the probability [B, C] that went to other classes, 0 to 1, of the worst image.

    Unlike the largest difference of a class, it also shows in networks whose probabilities are all
    small. NaN if `actual` has one.
    """
    return (expected - actual).abs().sum(dim=1).max().item() / 2


@torch.no_grad()  # not inference_mode, which would mark the folded weights for good
def fold_batch_norms(network: nn.Module, transform: InputTransform) -> nn.Module:
    """The network with each batch norm folded into the convolution before it.

    A network that cannot be traced, or whose probabilities would change, is returned as it is.
    """
    with suppress(fx.proxy.TraceError, RuntimeError, TypeError, ValueError):
        folded = fuse(network)
        images = _noise(transform)
        if difference(network(images).softmax(1), folded(images).softmax(1)) <= MAX_DIFFERENCE:
            return folded
    return network


@torch.no_grad()
def fuse_relus(network: nn.Module, transform: InputTransform) -> nn.Module:
    """The network that `fold_batch_norms` made with convolution, add and ReLU in one call each.

    It shares the weights. A network in which there is nothing to fuse, or that was not traced, is
    returned as it is, and so is one whose probabilities would change, which is logged.
    """
    if not isinstance(network, fx.GraphModule):
        return network
    images = _noise(transform)
    logits = ShapeProp(network).propagate(images)  # notes the shapes that `_chains` asks for
    fused = fx.GraphModule(network, deepcopy(network.graph))
    chains = list(_chains(fused))
    if not chains:
        return network
    for chain in chains:
        _replace(fused, chain)
    fused.delete_all_unused_submodules()
    try:
        fused.graph.lint()
        fused.recompile()
        moved = difference(logits.softmax(1), fused(images).softmax(1))
    except RuntimeError as exc:
        log_line(WARNING, "not_fused", reason=str(exc))
        return network
    if not moved <= MAX_DIFFERENCE:
        log_line(WARNING, "not_fused", reason=f"it moves {moved:.4f} of the probability")
        return network
    return fused


def _noise(transform: InputTransform) -> Tensor:
    """Normalised images to try a network with: float32 [2, 3, H, W], the same each time.

    Two, because a batch of one would hide a residual that is broadcast along the batch.
    """
    size = transform.crop_size
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


class FusedConvolution(nn.Module):
    """ReLU of a convolution, or of a convolution plus a residual.

    One kernel of cuDNN on a GPU; on a CPU, and if cuDNN has no kernel for it, a call for each.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.convolution = convolution  # with its own weights, which are not copied
        self.refusal: str | None = None  # what cuDNN said

    def forward(self, images: Tensor, residual: Tensor | None = None) -> Tensor:
        """[B, C, H, W], and for the residual the shape of the result."""
        if images.is_cuda and self.refusal is None:
            try:
                return self._in_one(images, residual)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as exc:
                self.refusal = str(exc)
        result = self.convolution(images)
        if residual is not None:
            result.add_(residual)
        return result.relu_()

    def _in_one(self, images: Tensor, residual: Tensor | None) -> Tensor:
        # Both take their memory format from images and weights, and bring the residual into it.
        # The bias may be None. cuDNN sums in float32 and rounds once. See
        # aten/src/ATen/native/cudnn/ConvShared.cpp and Conv_v8.cpp in torch.
        own = self.convolution
        sizes: tuple[Any, ...] = (own.stride, own.padding, own.dilation, own.groups)
        if residual is None:
            return torch.cudnn_convolution_relu(images, own.weight, own.bias, *sizes)
        return torch.cudnn_convolution_add_relu(images, own.weight, residual, 1, own.bias, *sizes)


class _Chain(NamedTuple):
    """Nodes that one call may replace."""

    convolution: fx.Node
    add: fx.Node | None
    relu: fx.Node


def _chains(network: fx.GraphModule) -> Iterator[_Chain]:
    modules = dict(network.named_modules())
    for relu in network.graph.nodes:
        if not (_is_relu(relu, modules) and relu.args and isinstance(relu.args[0], fx.Node)):
            continue
        before = relu.args[0]
        if _fusible(before, modules):
            yield _Chain(before, None, relu)
        elif _is_add(before):
            first, second = before.all_input_nodes
            # An add in place writes to its first argument, which only a convolution's may be.
            pairs = [(first, second), (second, first)][: 1 if _in_place(before) else 2]
            for convolution, residual in pairs:
                if _fusible(convolution, modules) and _may_add(convolution, before, residual):
                    yield _Chain(convolution, before, relu)
                    break


def _replace(network: fx.GraphModule, chain: _Chain) -> None:
    name = f"fused_{chain.convolution.name}"
    convolution = network.get_submodule(str(chain.convolution.target))
    network.add_submodule(name, FusedConvolution(cast(nn.Conv2d, convolution)))
    # The residual is asked for only now: it may be the result of a chain that was replaced before.
    residuals = chain.add.all_input_nodes if chain.add else []
    inputs = [chain.convolution.args[0], *(node for node in residuals if node != chain.convolution)]
    # An add reads its residual where it stands. Without one, everything stays where the convolution
    # was, whose input might be written to later.
    with network.graph.inserting_before(chain.add or chain.convolution):
        fused = network.graph.call_module(name, tuple(inputs))
    chain.relu.replace_all_uses_with(fused)
    for node in (chain.relu, chain.add, chain.convolution):
        if node is not None:
            network.graph.erase_node(node)


def _is_relu(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return type(modules[str(node.target)]) is nn.ReLU
    if node.op == "call_method":
        return node.target in RELU_METHODS
    return node.op == "call_function" and node.target in RELUS


def _is_add(node: fx.Node) -> bool:
    """Two different tensors, not scaled, that nobody but the one ReLU reads the sum of."""
    named = node.op == "call_method" and node.target in ADD_METHODS
    called = node.op == "call_function" and node.target in ADDS
    return (
        (named or called)
        and len(node.users) == 1
        and not node.kwargs
        and len(node.all_input_nodes) == len(node.args) == 2
    )


def _in_place(add: fx.Node) -> bool:
    return add.target in ADDS_IN_PLACE


def _fusible(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """A convolution that cuDNN can fuse and whose result nobody else reads."""
    if node.op != "call_module" or len(node.users) != 1 or len(node.args) != 1:
        return False
    own = modules[str(node.target)]
    return (
        type(own) is nn.Conv2d
        and own.padding_mode == "zeros"
        and not isinstance(own.padding, str)
        # torch has kernels of its own for depthwise convolutions.
        and not own.groups == own.in_channels > 1
    )


def _may_add(convolution: fx.Node, add: fx.Node, residual: fx.Node) -> bool:
    """Whether the convolution can be computed where the add is, and adds the residual as it is."""
    shapes = [
        getattr(node.meta.get("tensor_meta"), "shape", None) for node in (convolution, residual)
    ]
    # Another reader in between might write to the input, as ReLU in place does.
    others = convolution.args[0].users if isinstance(convolution.args[0], fx.Node) else ()
    return (
        shapes[0] is not None
        and shapes[0] == shapes[1]
        and not any(convolution < other < add for other in others)
    )
