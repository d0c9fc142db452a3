"""The OpenVINO model of an archive: that of the network, or none."""

import pytest
import torch

from handler.errors import InvalidModel
from service.archive.conversion import check_conversion, to_openvino
from tests.unit.tiny import tiny_card, tiny_golden, tiny_network


def test_a_model_that_computes_something_else_is_refused() -> None:
    golden, transform = tiny_golden(), tiny_card().transform
    network = tiny_network()
    check_conversion(to_openvino(network, transform), golden)
    with torch.no_grad():
        next(network.parameters()).mul_(1.5)
    other = to_openvino(network, transform)
    with pytest.raises(InvalidModel, match=r"something else than torch: the logits' error is .*; "):
        check_conversion(other, golden)


def test_a_network_that_openvino_cannot_express_is_refused() -> None:
    class Strange(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.linalg.eigvals(images[:, 0]).real

    with pytest.raises(InvalidModel, match="OpenVINO cannot convert it; engine: torch"):
        to_openvino(Strange(), tiny_card().transform)
