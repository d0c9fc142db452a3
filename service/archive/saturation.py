"""int8 weights that are right on every x86 CPU, with or without VNNI.

Without VNNI a CPU multiplies bytes in pairs (vpmaddubsw): u8 x i8 + u8 x i8, clipped to 16 bits.
Two neighbouring input channels with large activations and large weights exceed that, and the sum is
silently wrong. NNCF's overflow fix halves the range of all weights, which costs each of them a bit.
Here each output channel gets the range with the least error on calibration images, clipping
included: most channels keep all 8 bits. docs/engines.md has both, measured.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as ops

from service.archive.inference import Image, compile_for_one, run_each
from service.archive.progress import stage

SHRINKS = (1.0, 1.06, 1.12, 1.2, 1.3, 1.45, 1.6, 1.8, 2.0)  # at 2 no pair can be clipped
POSITIONS = 600  # of a layer's input, from all images together
WEIGHTED = ("Convolution", "GroupConvolution", "MatMul")
_KEEPS_RANGE = ("Reshape", "Squeeze", "Unsqueeze", "Transpose", "MaxPool")


@dataclass(frozen=True)
class Int8Layer:
    """A layer with int8 weights, as NNCF leaves it in the graph."""

    node: Any
    weights: Any  # Constant
    scale: Any  # Multiply, after the weights

    @property
    def name(self) -> str:
        return str(self.node.get_friendly_name())

    @property
    def pairs(self) -> bool:
        """Whether it multiplies in pairs, which one input channel (depthwise) does not make."""
        return self.node.get_type_name() != "GroupConvolution" or self.weights.shape[2] > 1

    def grouped(self) -> NDArray[np.int64]:
        """The weights as [G, O, I, K]: groups, output and input channels of each, kernel."""
        weights = np.array(self.weights.data, np.int64)
        if self.node.get_type_name() != "GroupConvolution":
            weights = weights[None]
        return weights.reshape(*weights.shape[:3], -1)

    def real_weights(self) -> NDArray[np.float32]:
        """The weights that the bytes stand for: float32, in the layer's own shape."""
        scale = self.scale.input_value(1).get_node().data
        return np.asarray(self.weights.data * scale, np.float32)

    def replace(self, grouped: NDArray[np.int64], shrinks: NDArray[np.float64]) -> None:
        """Set weights [G, O, I, K] and multiply the scale of each output channel [G, O]."""
        shape = tuple(self.weights.shape)
        leading = 2 if self.node.get_type_name() == "GroupConvolution" else 1
        ones = (1,) * (len(shape) - leading)
        old = self.scale.input_value(1).get_node().data
        scale = np.asarray(old * shrinks.reshape(*shape[:leading], *ones), old.dtype)
        weights = ops.constant(grouped.reshape(shape).astype(np.int8))
        for user in self.weights.output(0).get_target_inputs():
            user.replace_source_output(weights.output(0))
        self.scale.input(1).replace_source_output(ops.constant(scale).output(0))


def weighted_layers(model: ov.Model) -> list[Any]:
    """Convolutions and matrix products with constant weights, in the network's order."""
    return [
        node
        for node in model.get_ordered_ops()
        if node.get_type_name() in WEIGHTED and _weights(node)[0].get_type_name() == "Constant"
    ]


def depthwise_layers(model: ov.Model) -> list[str]:
    """Names of the convolutions with one input channel per group."""
    return [
        node.get_friendly_name()
        for node in weighted_layers(model)
        if node.get_type_name() == "GroupConvolution" and node.get_input_shape(1)[2] == 1
    ]


def int8_layers(model: ov.Model) -> list[Int8Layer]:
    """The layers of a quantised model whose weights are int8, one scale per output channel."""
    layers = []
    for node in weighted_layers(model):
        weights, way = _weights(node)
        if (
            weights.get_element_type() == ov.Type.i8
            and [step.get_type_name() for step in way] == ["Multiply", "Convert"]
            and (node.get_type_name() != "MatMul" or _is_linear(node))
        ):
            layers.append(Int8Layer(node, weights, way[0]))
    return layers


def _weights(node: Any) -> tuple[Any, list[Any]]:
    """The source of a layer's weights, and the nodes from the layer back to it."""
    source, way = node.input_value(1).get_node(), []
    while source.get_type_name() in ("Reshape", "Convert", "Multiply", "Subtract", "FakeQuantize"):
        way.append(source)
        source = source.input_value(0).get_node()
    return source, way


def _is_linear(node: Any) -> bool:
    """[N, I] x [O, I] transposed, as torch.nn.Linear becomes."""
    return len(node.get_input_shape(1)) == 2 and bool(node.get_attributes()["transpose_b"])


def input_quantizer(node: Any) -> Any | None:
    """The FakeQuantize in front of a layer; None if its input stays in floating point."""
    source = node.input_value(0).get_node()
    while source.get_type_name() in _KEEPS_RANGE:
        source = source.input_value(0).get_node()
    return source if source.get_type_name() == "FakeQuantize" else None


def fit_ranges(int8: ov.Model, fp32: ov.Model, images: Sequence[Image], core: ov.Core) -> None:
    """Round the weights of `int8` again, in place, if sums of pairs would be clipped.

    `fp32` is the model that it was made from, for the activations of every layer.
    """
    layers = {layer.name: layer for layer in int8_layers(int8) if layer.pairs}
    samples = _sample_inputs(fp32, set(layers), images, core)
    with stage("Fitting weights", len(samples), "layer") as done:
        for name, inputs in samples.items():
            _fit_layer(layers[name], inputs)
            done()
    int8.validate_nodes_and_infer_types()


def _fit_layer(layer: Int8Layer, inputs: NDArray[np.float32]) -> None:
    """Round a layer's weights again for inputs [N, channels], if sums of pairs are clipped."""
    quantizer = input_quantizer(layer.node)
    if quantizer is None:  # then OpenVINO does not run this layer in int8
        return
    low, high = (_constant(quantizer, port) for port in (1, 2))
    step = (high.max() - low.min()) / 255
    pixels = np.rint((inputs - low.min()) / step).clip(0, 255).astype(np.float32)
    zero = np.rint(-low.min() / step)
    rounded, shrinks = _least_error(pixels, float(zero), layer.grouped())
    if (shrinks > 1).any():
        layer.replace(rounded, shrinks)


def _constant(node: Any, port: int) -> NDArray[np.float32]:
    return np.asarray(node.input_value(port).get_node().data)


def _sample_inputs(
    model: ov.Model, names: set[str], images: Sequence[Image], core: ov.Core
) -> dict[str, NDArray[np.float32]]:
    """float32 [N, channels] by layer: positions of its input, as many from each image."""
    model = model.clone()
    tensors: dict[tuple[str, int], Any] = {}
    inputs = {}  # the tensor of each layer, which several layers may read
    for node in weighted_layers(model):
        if (name := node.get_friendly_name()) in names:
            tensor = node.input_value(0)
            inputs[name] = tensor.get_node().get_friendly_name(), tensor.get_index()
            tensors.setdefault(inputs[name], tensor)
    own = len(model.outputs)
    model.add_outputs(list(tensors.values()))
    each = -(-POSITIONS // len(images))

    def read(index: int, request: Any) -> list[NDArray[np.float32]]:
        rng = np.random.default_rng(index)
        found = []
        for output in range(own, own + len(tensors)):
            values = request.get_output_tensor(output).data
            if values.ndim == 4:  # [1, C, H, W] -> [H * W, C]
                values = values[0].reshape(values.shape[1], -1).T
            values = values.reshape(-1, values.shape[-1])
            chosen = rng.choice(len(values), min(each, len(values)), replace=False)
            found.append(values[chosen].astype(np.float32))
        return found

    samples = []  # of each image, by tensor
    with stage("Sampling activations", len(images), "image") as done:
        for found in run_each(compile_for_one(model, images[0].shape, core), images, read):
            samples.append(found)
            done()
    joined = {
        key: np.concatenate(parts)
        for key, parts in zip(tensors, zip(*samples, strict=True), strict=True)
    }
    return {name: joined[key] for name, key in inputs.items()}


def _least_error(
    pixels: NDArray[np.float32], zero: float, weights: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Weights [G, O, I, K] rounded for inputs [N, G * I], and the shrink factor of each [G, O].

    `zero` is the byte that stands for 0.0.
    """
    groups, outputs, inputs, _ = weights.shape
    rounded, shrinks = weights.copy(), np.ones((groups, outputs))
    for group in range(groups):
        seen = pixels[:, group * inputs : (group + 1) * inputs]
        active = np.arange(outputs)  # channels in which something is still clipped
        least = np.full(outputs, np.inf)
        for shrink in SHRINKS:
            exact = weights[group, active]
            trial = np.rint(exact / shrink).astype(np.int64)
            error, clipped = _errors(seen, zero, exact, trial, shrink)
            better = error < least[active]
            chosen = active[better]
            least[chosen] = error[better]
            rounded[group, chosen] = trial[better]
            shrinks[group, chosen] = shrink
            active = active[clipped]
            if not active.size:
                break
    return rounded, shrinks


def _errors(
    pixels: NDArray[np.float32],
    zero: float,
    exact: NDArray[np.int64],
    trial: NDArray[np.int64],
    shrink: float,
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Mean squared error of the clipped sums [O], and whether anything was clipped [O].

    Weights are [O, I, K]; each position of the kernel is tried on every sample of the input.
    """
    error = np.zeros(len(exact), np.float32)
    clipped = np.zeros(len(exact), np.bool_)
    most = pixels.max(0)
    for position in range(exact.shape[2]):
        change = exact[:, :, position] - shrink * trial[:, :, position]
        factors = trial[:, :, position].T.astype(np.float32)  # [I, O]
        difference = (pixels - zero) @ change.T.astype(np.float32)  # of rounding, without clipping
        for channel, outputs in _at_risk(most, factors):
            pair = pixels[:, channel : channel + 2] @ factors[channel : channel + 2, outputs]
            excess = pair - pair.clip(-32768, 32767)
            clipped[outputs] |= excess.any(0)
            difference[:, outputs] += shrink * excess
        error += np.square(difference).mean(0)
    return error, clipped


def _at_risk(
    most: NDArray[np.float32], factors: NDArray[np.float32]
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """First channels of pairs, and the outputs in which inputs up to `most` [I] could clip them.

    With `factors` [I, O] these are few: both weights must be large and of the same sign.
    """
    bounds = most[:, None] * factors
    starts = range(0, len(factors), 2)
    highest = np.add.reduceat(bounds.clip(min=0), starts)
    lowest = np.add.reduceat(bounds.clip(max=0), starts)
    risky = (highest > 32767) | (lowest < -32768)
    for pair in np.flatnonzero(risky.any(1)):
        yield 2 * int(pair), np.flatnonzero(risky[pair])
