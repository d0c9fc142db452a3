"""The harm that int8 does in each layer."""

from collections.abc import Sequence

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from service.archive.inference import Image, Probabilities, answer, compile_for_one
from service.archive.progress import stage
from service.archive.saturation import Int8Layer, input_quantizer, int8_layers, weighted_layers


def rank_layers(
    fp32: ov.Model, int8: ov.Model, images: Sequence[Image], core: ov.Core
) -> list[tuple[str, float]]:
    """Names of the int8 layers and the harm of each, most harmful first.

    Harm: the Kullback-Leibler divergence of the probabilities, in nats per image, if this layer
    alone is quantised.
    """

    def answers(model: ov.Model) -> Probabilities:
        return answer(compile_for_one(model, images[0].shape, core), images)

    expected, harms = answers(fp32), []
    layers = int8_layers(int8)
    with stage("Ranking layers", len(layers), "layer") as done:
        for layer in layers:
            harms.append((layer.name, divergence(expected, answers(_only(fp32, layer)))))
            done()
    return sorted(harms, key=lambda entry: entry[1], reverse=True)


def _only(model: ov.Model, layer: Int8Layer) -> ov.Model:
    """A copy of the model with the input and the weights of one layer quantised."""
    copy = model.clone()
    node = next(n for n in weighted_layers(copy) if n.get_friendly_name() == layer.name)
    node.input(1).replace_source_output(ops.constant(layer.real_weights()).output(0))
    quantizer = input_quantizer(layer.node)
    if quantizer is not None:
        bounds = [quantizer.input_value(port).get_node().data for port in range(1, 5)]
        levels = quantizer.get_attributes()["levels"]
        quantized = ops.fake_quantize(node.input_value(0), *map(ops.constant, bounds), levels)
        node.input(0).replace_source_output(quantized.output(0))
    return copy


def divergence(expected: Probabilities, actual: Probabilities) -> float:
    """Mean Kullback-Leibler divergence of rows of probabilities, in nats."""
    tiny = 1e-9
    return float((expected * np.log((expected + tiny) / (actual + tiny))).sum(axis=1).mean())
