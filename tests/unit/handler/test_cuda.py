"""The engine for GPUs: all but the graphs themselves runs on the CPU as well."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import handler.cuda
from handler.cuda import Cuda, fixed_sizes, fold_batch_norms
from handler.engines import load_engine
from handler.errors import InvalidSettings
from handler.networks import build_network, get_recipe, input_transform
from handler.settings import Settings
from handler.torch_engine import TorchEager
from tests.precisions import each
from tests.unit.handler.test_engines import TRANSFORM, eager, pixels
from tests.unit.tiny import make_model_dir, tiny_card, tiny_network


def cuda(max_forward: int = 6, precision: str = "fp32", device: str = "cpu") -> Cuda:
    return Cuda(tiny_network(), TRANSFORM, precision, device, max_forward)


@pytest.mark.parametrize(
    ("largest", "sizes"), [(1, [1]), (6, [1, 2, 4, 6]), (32, [1, 2, 4, 8, 16, 32])]
)
def test_fixed_sizes(largest: int, sizes: list[int]) -> None:
    assert fixed_sizes(largest) == sizes


def test_engine_says_what_it_is() -> None:
    engine = cuda(max_forward=4, precision="bf16")
    assert (engine.name, engine.precision, engine.max_forward) == ("cuda-bf16", "bf16", 4)
    assert not engine.is_lost()


# --- Padding and staging


@pytest.mark.parametrize("count", range(1, 7))
def test_any_number_of_images_gives_what_eager_gives(count: int) -> None:
    images = torch.cat([pixels(), pixels().flip(3)])[:count]
    given = cuda().probabilities(images)
    assert (given.shape, given.dtype, given.device.type) == ((count, 3), torch.float32, "cpu")
    torch.testing.assert_close(given, eager().probabilities(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("count", "size"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 6), (6, 6)])
def test_a_batch_is_padded_to_the_next_size(count: int, size: int) -> None:
    engine = cuda()
    called: list[int] = []
    for own, run in dict(engine._passes).items():

        def noted(own: int = own, run: Callable[[], Tensor] = run) -> Tensor:
            called.append(own)
            return run()

        engine._passes[own] = noted
    engine.probabilities(pixels()[:1].expand(count, -1, -1, -1))
    assert called == [size]


def test_more_images_than_a_pass_takes_are_an_error() -> None:
    with pytest.raises(StopIteration):
        cuda(max_forward=2).launch(list(pixels()[:3]))


def test_what_was_there_before_does_not_show() -> None:
    """A small batch after a large one: the rest of the input is the large one's."""
    engine, images = cuda(), pixels()
    engine.probabilities(images)
    alone = engine.probabilities(images[4:5])
    torch.testing.assert_close(alone, eager().probabilities(images[4:5]), rtol=0, atol=1e-5)


def test_several_passes_under_way_do_not_overwrite_each_other() -> None:
    engine, images = cuda(), pixels()
    waiting = [engine.launch([image]) for image in images]
    given = torch.from_numpy(np.concatenate([wait() for wait in waiting[::-1]][::-1]))
    torch.testing.assert_close(given, eager().probabilities(images), rtol=0, atol=1e-5)


# --- Folding


NAMES = ["resnet18", "mobilenet_v2", "densenet121", "googlenet", "squeezenet1_1"]


@pytest.mark.parametrize("architecture", NAMES)
def test_folded_networks_compute_the_same(architecture: str) -> None:
    recipe = get_recipe(architecture)
    torch.manual_seed(0)
    network = build_network(recipe, architecture, 5)
    for module in network.modules():  # as if trained: fresh ones change nothing
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in [
                (module.running_mean, -0.1, 0.1),
                (module.running_var, 0.5, 1.5),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.1, 0.1),
            ]:
                assert tensor is not None
                tensor.uniform_(low, high)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    folded = fold_batch_norms(network, input_transform(recipe))
    images = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        given, expected = folded(images).softmax(1), network(images).softmax(1)
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-5)
    left = sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    had = sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    # In DenseNet half of the norms come before their convolution, and stay.
    assert left == (62 if architecture == "densenet121" else 0)
    assert had > left or architecture == "squeezenet1_1"
    assert all(torch.equal(network.state_dict()[name], before[name]) for name in before)


class Branching(nn.Module):
    """Cannot be traced: what it does depends on what it sees."""

    def forward(self, images: Tensor) -> Tensor:
        if images.sum() > 0:
            return images.mean(dim=(2, 3))
        return images.amax(dim=(2, 3))


def test_a_network_that_cannot_be_traced_stays_as_it_is() -> None:
    network = Branching()
    assert fold_batch_norms(network, TRANSFORM) is network


def test_a_fold_that_changes_the_answers_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handler.cuda, "fuse", lambda _: Branching())
    network = tiny_network()
    assert fold_batch_norms(network, TRANSFORM) is network


# --- Memory


def test_too_little_memory_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(self: Cuda, size: int) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(Cuda, "_prepare", prepare)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (300 * 2**20, 16384 * 2**20))
    expected = "max_forward is 6, .* 300 of 16384 MiB are free; set max_forward lower"
    with pytest.raises(InvalidSettings, match=expected) as caught:
        cuda()
    assert caught.value.__cause__ is None


# --- On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "off"), each(fp32=1e-3, fp16=0.01, bf16=0.05))
def test_graphs_give_what_eager_gives(precision: str, off: float) -> None:
    engine = cuda(precision=precision, device="cuda:0")
    expected = eager().probabilities(pixels())
    for count in (1, 2, 3, 5):
        given = engine.probabilities(pixels()[:count])
        torch.testing.assert_close(given, expected[:count], rtol=0, atol=off)


@pytest.mark.gpu
def test_images_of_cpu_and_gpu_share_a_pass() -> None:
    engine, images = cuda(device="cuda:0"), pixels()
    mixed = [image.cuda() if place % 2 else image for place, image in enumerate(images)]
    wait, again = engine.launch(mixed), engine.launch([image.cuda() for image in images])
    expected = eager().probabilities(images)
    for given in (wait(), again()):
        torch.testing.assert_close(torch.from_numpy(given), expected, rtol=0, atol=1e-3)


@pytest.mark.gpu
def test_passes_under_way_do_not_overwrite_each_other_on_a_gpu() -> None:
    engine, images = cuda(device="cuda:0"), pixels()
    waiting = [engine.launch([image]) for _ in range(20) for image in images]
    given = torch.from_numpy(np.concatenate([wait() for wait in waiting]))
    expected = eager().probabilities(images).repeat(20, 1)
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-3)


@pytest.mark.gpu
def test_a_gpu_takes_the_engine_cuda(tmp_path: Any) -> None:
    folder = make_model_dir(tmp_path)
    engine = load_engine(tiny_card(), folder, Settings(max_forward=2), gpu_id=0, workers=1)
    assert engine.name in ("cuda-bf16", "cuda-fp16")
    assert (engine.device, engine.max_forward) == ("cuda:0", 2)
    assert not engine.is_lost()
    reference = TorchEager(tiny_network(), tiny_card().transform)
    images = pixels(tiny_card().transform)[:2]
    given = engine.probabilities(images)
    torch.testing.assert_close(given, reference.probabilities(images), rtol=0, atol=0.05)
