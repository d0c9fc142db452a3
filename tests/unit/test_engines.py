"""Engines against plain torchvision: the same probabilities, whatever the batch."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.transforms import functional as F  # noqa: N812

from handler.engines import TorchEager, check_precision, choose_device, load_engine
from handler.errors import InvalidSettings
from handler.images import InputTransform
from handler.model_card import WEIGHTS_FILE
from handler.settings import Settings
from tests.drawing import BLUE, GREEN, RED, noise, plain, quarters
from tests.unit.tiny import RECIPE, make_model_dir, tiny_card, tiny_network

# The recipe's own but for the size: a third of the work.
TRANSFORM = replace(InputTransform.from_recipe(RECIPE), resize_size=[144], crop_size=[128])
PICTURES = [noise((300, 200)), quarters(), plain(RED), plain(GREEN), plain(BLUE)]
CPU = Settings(device="cpu", threads=1)
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def pixels(transform: InputTransform = TRANSFORM) -> Tensor:
    """uint8 [5, 3, H, W]."""
    return torch.stack([transform(picture) for picture in PICTURES])


def reference(network: nn.Module | None = None) -> Tensor:
    """torchvision's own steps, one after the other: float32 [5, 3]."""
    inputs = F.normalize(pixels().float() / 255, TRANSFORM.mean, TRANSFORM.std)
    with torch.inference_mode():
        return (network or tiny_network())(inputs).softmax(dim=1)


def eager(precision: str = "fp32", device: str = "cpu") -> TorchEager:
    return TorchEager(tiny_network(), TRANSFORM, precision, device)


def test_the_reference_tells_pictures_apart() -> None:
    assert (reference().std(dim=0) > 0.05).any()


def test_eager_gives_torchvisions_probabilities() -> None:
    torch.testing.assert_close(eager().probabilities(pixels()), reference(), rtol=0, atol=1e-6)


def test_eager_gives_what_the_recipe_gives() -> None:
    transform = InputTransform.from_recipe(RECIPE)
    network = tiny_network()
    with torch.inference_mode():
        inputs = torch.stack([RECIPE.transforms()(picture) for picture in PICTURES])
        wanted = network(inputs).softmax(dim=1)
    given = TorchEager(network, transform, "fp32", "cpu").probabilities(pixels(transform))
    torch.testing.assert_close(given, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rows_sum_to_one(precision: str) -> None:
    probabilities = eager(precision).probabilities(pixels())
    assert (probabilities.shape, probabilities.dtype) == ((5, 3), torch.float32)
    assert probabilities.device.type == "cpu"
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(5), rtol=0, atol=1e-6)


def test_bf16_is_close() -> None:
    bf16 = eager("bf16").probabilities(pixels())
    torch.testing.assert_close(bf16, reference(), rtol=0, atol=0.05)
    assert not torch.equal(bf16, reference())  # or it was not bf16


def test_a_batch_is_as_good_as_one_by_one() -> None:
    engine, images = eager(), pixels()
    alone = torch.cat([engine.probabilities(images[i : i + 1]) for i in range(len(images))])
    torch.testing.assert_close(engine.probabilities(images), alone, rtol=0, atol=1e-5)


def test_images_are_left_as_they_came() -> None:
    images = pixels()
    eager().probabilities(images)
    assert torch.equal(images, pixels())


def test_answers_do_not_change_with_time() -> None:
    """No dropout, no running statistics."""
    engine, images = eager(), pixels()
    assert torch.equal(engine.probabilities(images), engine.probabilities(images))


def test_network_in_training_mode_is_put_out_of_it() -> None:
    engine = TorchEager(tiny_network().train(), TRANSFORM, "fp32", "cpu")
    torch.testing.assert_close(engine.probabilities(pixels()), reference(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_engine_says_what_it_is(precision: str) -> None:
    engine = eager(precision)
    assert (engine.name, engine.precision, engine.device) == (
        f"torch-{precision}",
        precision,
        "cpu",
    )


# --- From an archive


def test_load_engine_runs_the_archives_weights(tmp_path: Path) -> None:
    folder = make_model_dir(tmp_path)
    engine = load_engine(tiny_card(), folder, CPU, gpu_id=None, workers=1)
    torch.testing.assert_close(engine.probabilities(pixels()), reference(), rtol=0, atol=1e-6)
    assert (engine.name, engine.device) == ("torch-fp32", "cpu")


@pytest.mark.parametrize("architecture", ["mobilenet_v3_small", "regnet_y_400mf"])
def test_load_engine_of_other_kinds(tmp_path: Path, architecture: str) -> None:
    folder = make_model_dir(tmp_path, architecture)
    engine = load_engine(tiny_card(architecture), folder, CPU, gpu_id=None, workers=1)
    wanted = reference(tiny_network(architecture))
    torch.testing.assert_close(engine.probabilities(pixels()), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("precision", "name"), [("auto", "torch-fp32"), ("fp32", "torch-fp32"), ("bf16", "torch-bf16")]
)
def test_precision_of_the_settings(tmp_path: Path, precision: str, name: str) -> None:
    settings = Settings(device="cpu", threads=1, precision=precision)
    engine = load_engine(tiny_card(), make_model_dir(tmp_path), settings, gpu_id=None, workers=1)
    assert engine.name == name


def test_tensors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = make_model_dir(tmp_path)
    state = load_file(folder / WEIGHTS_FILE)
    del state["features.0.weight"]
    save_file(state, folder / WEIGHTS_FILE)
    with pytest.raises(RuntimeError, match=r"features\.0\.weight"):
        load_engine(tiny_card(), folder, CPU, gpu_id=None, workers=1)


def test_labels_decide_the_number_of_classes(tmp_path: Path) -> None:
    card = replace(tiny_card(), labels=("a", "b", "c", "d"))
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_engine(card, make_model_dir(tmp_path), CPU, gpu_id=None, workers=1)


@pytest.mark.parametrize(
    ("threads", "workers", "cores", "used"),
    [(0, 1, 8, 8), (0, 2, 8, 4), (0, 3, 8, 2), (0, 16, 8, 1), (0, 0, 8, 8), (3, 2, 8, 3)],
)
def test_workers_share_the_cores(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    threads: int,
    workers: int,
    cores: int,
    used: int,
) -> None:
    monkeypatch.setattr("handler.engines.available_cores", lambda: cores)
    settings = Settings(device="cpu", threads=threads)
    load_engine(tiny_card(), make_model_dir(tmp_path), settings, gpu_id=None, workers=workers)
    assert torch.get_num_threads() == used


# --- Devices and precisions


def test_int8_is_refused(tmp_path: Path) -> None:
    settings = Settings(precision="int8")
    with pytest.raises(InvalidSettings, match="got 'int8'"):
        check_precision(settings)
    with pytest.raises(InvalidSettings):
        load_engine(tiny_card(), make_model_dir(tmp_path), settings, gpu_id=None, workers=1)


@NO_GPU
def test_cuda_without_a_gpu_is_refused(tmp_path: Path) -> None:
    settings = Settings(device="cuda")
    with pytest.raises(InvalidSettings, match="device is cuda, and torch sees no GPU here"):
        load_engine(tiny_card(), make_model_dir(tmp_path), settings, gpu_id=None, workers=1)


@pytest.mark.parametrize(
    ("device", "gpus", "gpu_id", "chosen"),
    [
        ("auto", True, None, "cuda:0"),
        ("auto", True, 0, "cuda:0"),
        ("auto", True, 3, "cuda:3"),
        ("auto", False, None, "cpu"),
        ("auto", False, 0, "cpu"),
        ("cpu", True, 1, "cpu"),
        ("cpu", False, None, "cpu"),
        ("cuda", True, None, "cuda:0"),
        ("cuda", True, 1, "cuda:1"),
    ],
)
def test_device_of_a_worker(
    monkeypatch: pytest.MonkeyPatch, device: str, gpus: bool, gpu_id: int | None, chosen: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    assert choose_device(Settings(device=device), gpu_id) == chosen


if torch.cuda.is_available():  # not a skip: without a GPU there is nothing to test

    def test_gpu_gives_the_same_probabilities() -> None:
        on_gpu = eager(device="cuda:0").probabilities(pixels())
        torch.testing.assert_close(on_gpu, reference(), rtol=0, atol=1e-3)
