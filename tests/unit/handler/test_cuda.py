"""The engine for GPUs: all but the graphs themselves runs on the CPU as well."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import handler.cuda
from handler.cuda import Cuda, blobs, capture, fixed_sizes
from handler.engines import load_engine
from handler.errors import InvalidModel, InvalidSettings
from handler.fusion import FusedConvolution
from handler.settings import Settings
from handler.torch_engine import TorchEager
from tests.precisions import each
from tests.unit.handler.conftest import Logged
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


# --- Fusing


@pytest.mark.parametrize(("precision", "fused"), [("fp32", 0), ("bf16", 26), ("fp16", 26)])
def test_16_bits_are_fused(precision: str, fused: int, logged: Logged) -> None:
    engine = cuda(precision=precision)
    found = [module for module in engine._model.modules() if isinstance(module, FusedConvolution)]
    assert len(found) == fused
    expected = [{"event": "fused", "convolutions": fused, "refused": 0}] if fused else []
    assert logged() == expected
    given = engine.probabilities(pixels())
    torch.testing.assert_close(given, eager(precision).probabilities(pixels()), rtol=0, atol=0.05)


class Wrong(nn.Module):
    """What a fused kernel must not do."""

    def __init__(self, network: nn.Module, fault: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.fault = network, fault

    def forward(self, images: Tensor) -> Tensor:
        return self.fault(self.network(images))


def refuse(logits: Tensor) -> Tensor:
    raise RuntimeError("GET was unable to find an engine to execute this computation")


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (lambda logits: logits.flip(1), "moves 0"),
        (lambda logits: logits.clone().fill_(torch.nan), "moves nan"),
        (refuse, "unable to find an engine"),
    ],
    ids=["wrong", "nan", "refused"],
)
def test_fusions_that_fail_are_not_used(
    monkeypatch: pytest.MonkeyPatch, logged: Logged, fault: Any, reason: str
) -> None:
    monkeypatch.setattr(handler.cuda, "fuse_relus", lambda network, _: Wrong(network, fault))
    engine = cuda(precision="bf16")
    (line,) = logged()
    assert line["event"] == "not_fused"
    assert reason in line["reason"]
    given = engine.probabilities(pixels())
    torch.testing.assert_close(given, eager("bf16").probabilities(pixels()), rtol=0, atol=0.01)


def test_a_graph_that_computes_something_else_stops_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(model: nn.Module, images: Tensor, pool: Any) -> Callable[[], Tensor]:
        run = capture(model, images, pool)
        return lambda: run().flip(1) if len(images) == 4 else run()

    monkeypatch.setattr(handler.cuda, "capture", wrong)
    with pytest.raises(InvalidModel, match=r"a CUDA graph of 4 images moves 0\.\d+ of the prob"):
        cuda()


def test_blobs_differ_from_each_other() -> None:
    images = blobs(5, 32)
    assert (images.shape, images.dtype) == ((5, 3, 32, 32), torch.uint8)
    assert images.flatten(1).unique(dim=0).shape[0] == 5
    assert torch.equal(images[:2], blobs(5, 32)[:2])
    assert images.max() - images.min() > 200


# --- Memory


def test_too_little_memory_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(model: nn.Module, images: Tensor, pool: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(handler.cuda, "capture", full)
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
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_convolutions_are_fused_on_a_gpu(precision: str, logged: Logged) -> None:
    cuda(precision=precision, device="cuda:0")
    (line,) = logged()
    assert (line["event"], line["convolutions"]) == ("fused", 26)
    assert line["refused"] < 26, line["reason"]  # few channels may be refused


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
