"""The last feature maps of a model for OpenVINO: a second compiled model, with one more output."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import openvino
import torch
from numpy.typing import NDArray
from torch import Tensor

from handler.inspection import Inspection, NotInspectable

# What may stand between the mean of the maps and the linear layer, and computes nothing; in int8
# FakeQuantize rounds.
PASS_ON = ("Reshape", "Squeeze", "FakeQuantize")


class Inspector:
    """The model for one image, with its last maps as a second output."""

    def __init__(self, model: openvino.Model, options: Mapping[str, Any]) -> None:
        """Raises NotInspectable."""
        pooling, weight, bias = last_layers(model)
        self._weight = _value(weight)
        self._bias = np.zeros(len(self._weight), np.float32) if bias is None else _value(bias)
        _, *shape = model.input(0).partial_shape
        model.reshape([1, *shape])
        model.add_outputs([pooling.input_value(0)])
        compiled = openvino.Core().compile_model(model, "CPU", options)
        self._request = compiled.create_infer_request()

    def run(self, images: Tensor) -> Inspection:
        """uint8 RGB [B, 3, H, W]."""
        results = [self._request.infer([image[None].numpy()]) for image in images]
        probabilities, maps = (
            torch.from_numpy(np.concatenate([result[place] for result in results]))
            for place in range(2)
        )
        weight, bias = torch.from_numpy(self._weight), torch.from_numpy(self._bias.reshape(-1))
        return Inspection(probabilities, maps, weight, bias)


def last_layers(
    model: openvino.Model,
) -> tuple[openvino.Node, openvino.Output, openvino.Output | None]:
    """The mean over positions, and weight [C, K] and bias of the linear layer that follows it.

    Raises NotInspectable if the model does not end so, before its softmax.
    """
    bias = None
    node = model.get_results()[0].input_value(0).get_node()
    if node.get_type_name() != "Softmax":
        raise NotInspectable
    node = node.input_value(0).get_node()
    if node.get_type_name() == "Add":
        bias = node.input_value(1)
        node = node.input_value(0).get_node()
    if node.get_type_name() != "MatMul" or not node.get_attributes()["transpose_b"]:
        raise NotInspectable
    weight = node.input_value(1)
    node = node.input_value(0).get_node()
    while node.get_type_name() in PASS_ON:
        node = node.input_value(0).get_node()
    if node.get_type_name() != "ReduceMean" or len(node.input_value(0).partial_shape) != 4:
        raise NotInspectable
    if {int(axis) % 4 for axis in _value(node.input_value(1)).flat} != {2, 3}:
        raise NotInspectable
    return node, weight, bias


def _value(constant: openvino.Output) -> NDArray[Any]:
    """What an output that depends on no input is."""
    compiled = openvino.compile_model(openvino.Model([constant], []), "CPU")
    return np.array(compiled([])[0])
