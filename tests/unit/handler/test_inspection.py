"""A second look at an image: the maps that the classifier saw give its answer."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from openvino import save_model
from torch import nn

from handler.cuda import Cuda
from handler.engine import Engine
from handler.inspection import NotInspectable
from handler.openvino_engine import OpenVino
from handler.torch_engine import TorchEager
from service.archive.conversion import to_openvino
from tests.unit.handler.test_engines import TRANSFORM, pixels
from tests.unit.tiny import tiny_network

POOLED = "shufflenet_v2_x0_5"  # small, and ends in a mean and a linear layer
OTHERS = ("squeezenet1_1", "mobilenet_v3_small")  # no linear layer; two of them


def ready(architecture: str) -> nn.Module:
    """With batch norms of these pictures, and a bias: random weights make nearly no difference."""
    network = tiny_network(architecture)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1
    with torch.no_grad():
        network.train()(pixels().float() / 255)
        for module in network.modules():
            if isinstance(module, nn.Linear) and module.out_features == 3:
                module.weight.mul_(0.2)
                module.bias.copy_(torch.tensor([0.5, -1, 2]))
    return network.eval()


def openvino(architecture: str, folder: Path) -> OpenVino:
    file = folder / "openvino.xml"
    save_model(to_openvino(ready(architecture), TRANSFORM), file, compress_to_fp16=False)
    return OpenVino(file, "fp32", max_forward=2)


def torch_eager(architecture: str, _folder: Path) -> TorchEager:
    return TorchEager(ready(architecture), TRANSFORM)


def cuda(architecture: str, _folder: Path) -> Cuda:
    return Cuda(ready(architecture), TRANSFORM, "fp32", "cpu", 6)


ENGINES: list[Callable[[str, Path], Engine]] = [torch_eager, openvino, cuda]


@pytest.mark.parametrize("load", ENGINES)
def test_the_maps_give_the_answer(load: Callable[[str, Path], Engine], tmp_path: Path) -> None:
    engine = load(POOLED, tmp_path)
    assert engine.inspectable
    found = engine.inspect(pixels())
    assert found.maps.shape == (len(pixels()), 1024, 4, 4)
    logits = found.maps.mean(dim=(2, 3)) @ found.weight.T + found.bias
    torch.testing.assert_close(logits.softmax(1), found.probabilities, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        found.probabilities,
        torch_eager(POOLED, tmp_path).probabilities(pixels()),
        rtol=0,
        atol=1e-4,
    )
    assert found.probabilities.std(dim=0).max() > 0.01  # the pictures have different answers


@pytest.mark.parametrize("load", ENGINES)
@pytest.mark.parametrize("architecture", OTHERS)
def test_a_network_that_ends_otherwise_is_refused(
    load: Callable[[str, Path], Engine], architecture: str, tmp_path: Path
) -> None:
    engine = load(architecture, tmp_path)
    assert not engine.inspectable
    with pytest.raises(NotInspectable):
        engine.inspect(pixels())


def test_openvino_compiles_no_second_model_before_it_is_asked(tmp_path: Path) -> None:
    engine = openvino(POOLED, tmp_path)
    engine.probabilities(pixels())
    assert "_inspector" not in vars(engine)
    assert engine.inspectable
    assert "_inspector" in vars(engine)
