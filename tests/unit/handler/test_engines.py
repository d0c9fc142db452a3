"""Engines against plain torchvision: the same probabilities, whatever the batch."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.transforms import functional as F  # noqa: N812

from handler.engine import Engine
from handler.engines import find_hardware, load_engine, share_of_cores
from handler.errors import InvalidModel
from handler.golden import GOLDEN_FILE
from handler.model_card import INT8_FILE, OPENVINO_FILE, WEIGHTS_FILE, InputTransform, ModelCard
from handler.networks import input_transform
from handler.openvino_engine import OpenVino, has_bf16
from handler.resize import resize_and_crop
from handler.selection import Hardware
from handler.settings import Settings
from handler.torch_engine import TorchEager
from tests.drawing import BLUE, GREEN, RED, noise, plain, quarters
from tests.precisions import each
from tests.unit.tiny import ARCHITECTURE, RECIPE, make_model_dir, tiny_card, tiny_network

ROOT = Path(__file__).resolve().parents[3]

# The recipe's own but for the size: a third of the work.
TRANSFORM = replace(input_transform(RECIPE), resize_size=144, crop_size=128)
PICTURES = [noise((300, 200)), quarters(), plain(RED), plain(GREEN), plain(BLUE)]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def pixels(transform: InputTransform = TRANSFORM) -> Tensor:
    """uint8 [5, 3, H, W]."""
    return torch.stack([resize_and_crop(np.array(picture), transform) for picture in PICTURES])


def reference(network: nn.Module | None = None) -> Tensor:
    """torchvision's own steps, one after the other: float32 [5, 3]."""
    inputs = F.normalize(pixels().float() / 255, TRANSFORM.mean, TRANSFORM.std)
    with torch.inference_mode():
        return (network or tiny_network())(inputs).softmax(dim=1)


def eager(precision: str = "fp32", device: str = "cpu") -> TorchEager:
    return TorchEager(tiny_network(), TRANSFORM, precision, device)


def test_the_reference_tells_pictures_apart() -> None:
    assert (reference().std(dim=0) > 0.05).any()


def test_eager_gives_what_the_recipe_gives() -> None:
    transform = input_transform(RECIPE)
    network = tiny_network()
    with torch.inference_mode():
        inputs = torch.stack([RECIPE.transforms()(picture) for picture in PICTURES])
        expected = network(inputs).softmax(dim=1)
    given = TorchEager(network, transform).probabilities(pixels(transform))
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-5)


def test_bf16_is_close() -> None:
    bf16 = eager("bf16").probabilities(pixels())
    torch.testing.assert_close(bf16, reference(), rtol=0, atol=0.05)
    torch.testing.assert_close(bf16.sum(dim=1), torch.ones(5), rtol=0, atol=1e-6)
    assert not torch.equal(bf16, reference())  # or it was not bf16


def test_network_in_training_mode_is_put_out_of_it() -> None:
    engine = TorchEager(tiny_network().train(), TRANSFORM)
    torch.testing.assert_close(engine.probabilities(pixels()), reference(), rtol=0, atol=1e-6)


# --- From an archive


def load(folder: Path, card: ModelCard | None = None, **settings: Any) -> Engine:
    chosen = Settings(device="cpu", threads=1, **settings)
    return load_engine(card or tiny_card(), folder, chosen, gpu_id=None, workers=1)


@pytest.mark.parametrize("architecture", [ARCHITECTURE, "mobilenet_v3_small", "regnet_y_400mf"])
def test_load_engine_runs_the_archives_weights(tmp_path: Path, architecture: str) -> None:
    engine = load(make_model_dir(tmp_path, architecture), tiny_card(architecture))
    assert engine.name == "torch-fp32"
    expected = reference(tiny_network(architecture))
    torch.testing.assert_close(engine.probabilities(pixels()), expected, rtol=0, atol=1e-6)


# --- OpenVINO


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked archive of a model that was packaged for OpenVINO."""
    return make_model_dir(tmp_path_factory.mktemp("converted"), openvino=True)


@pytest.mark.parametrize("max_forward", [1, 2, 4, 8])
@pytest.mark.parametrize(("precision", "off"), each(fp32=1e-4, bf16=0.05))
def test_openvino_gives_torchvisions_probabilities(
    converted: Path, precision: str, off: float, max_forward: int
) -> None:
    """Whatever the number of images is that it was compiled for: here there are five."""
    engine = OpenVino(converted / OPENVINO_FILE, precision, max_forward=max_forward)
    images = pixels(tiny_card().transform)
    expected = eager().probabilities(images)  # whatever their size
    given = torch.cat([engine.probabilities(part) for part in images.split(max_forward)])
    torch.testing.assert_close(given, expected, rtol=0, atol=off)
    if precision != "fp32":  # or it was not bf16
        assert (given - expected).abs().max() > 1e-4


@pytest.mark.parametrize("max_forward", [1, 4])
def test_openvino_launches_any_number_of_images(converted: Path, max_forward: int) -> None:
    """As many as one pass takes, and not: each row is that of its own image."""
    engine = OpenVino(converted / OPENVINO_FILE, "fp32", max_forward=max_forward)
    images = pixels(tiny_card().transform)[[0, 1, 2, 3, 4, 3, 1, 0, 2]]
    expected = eager().probabilities(images)
    for count in range(1, 10):
        given = engine.launch(list(images[:count]))()
        assert given.dtype == np.float32
        assert np.array_equal(given, engine.probabilities(images[:count]).numpy())
        torch.testing.assert_close(torch.from_numpy(given), expected[:count], rtol=0, atol=1e-4)


@pytest.mark.parametrize("count", [1, 2])
def test_openvinos_answers_are_not_overwritten_by_the_next(converted: Path, count: int) -> None:
    engine = OpenVino(converted / OPENVINO_FILE, "fp32", max_forward=2)
    images = pixels(tiny_card().transform)
    called, launched = engine.probabilities(images[:count]), engine.launch(list(images[:count]))()
    kept = launched.copy()
    engine.probabilities(images[2 : 2 + count])
    engine.launch(list(images[3 : 3 + count]))()
    assert np.array_equal(launched, kept)
    assert np.array_equal(called.numpy(), kept)


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / OPENVINO_FILE).write_text("<net/>")
    with pytest.raises(InvalidModel, match=r"openvino\.xml in the archive cannot be loaded"):
        OpenVino(tmp_path / OPENVINO_FILE, "fp32")


# --- Which engine


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"engine": "openvino", "precision": "fp32"}, "openvino-fp32"),
        ({"precision": "fp32"}, "openvino-fp32"),
        ({}, "openvino-bf16" if has_bf16() else "openvino-fp32"),
        ({"engine": "torch"}, "torch-fp32"),
        ({"engine": "torch", "precision": "bf16"}, "torch-bf16"),
    ],
)
def test_engine_and_precision_of_the_settings(
    converted: Path, settings: dict[str, Any], name: str
) -> None:
    engine = load(converted, **settings)
    assert engine.name == name
    assert engine.precision == name.partition("-")[2]
    assert (engine.device, engine.max_forward) == ("cpu", 2)


def test_max_forward_of_the_settings(converted: Path) -> None:
    assert load(converted, max_forward=3).max_forward == 3


def test_int8_is_taken_if_the_archive_has_it(converted: Path, tmp_path: Path) -> None:
    for path in converted.iterdir():
        (tmp_path / path.name).symlink_to(path)
    int8 = tmp_path / INT8_FILE
    int8.symlink_to(converted / OPENVINO_FILE)  # what is inside is quantisation's business
    int8.with_suffix(".bin").symlink_to((converted / OPENVINO_FILE).with_suffix(".bin"))
    card = replace(tiny_card(), int8={"agreement": 0.99})
    assert load(tmp_path, card).name == "openvino-int8"
    assert load(tmp_path, card, precision="int8").name == "openvino-int8"
    assert load(tmp_path, card, precision="fp32").name == "openvino-fp32"


class CoreOnBf16:
    """What OpenVINO says on a CPU that computes in bf16."""

    def get_property(self, device: str, name: str) -> list[str]:
        return ["BF16", "FP32", "INT8"]


@pytest.mark.parametrize(
    ("limit", "used"),
    [
        (None, True),
        ("", True),
        ("AVX512_CORE_BF16", True),
        ("AVX512_CORE_VNNI", False),
        ("avx2", False),  # oneDNN takes either case
    ],
)
def test_bf16_that_onednn_may_not_use_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, limit: str | None, used: bool
) -> None:
    """It would be emulated, at the accuracy of bf16 and at less than the speed of fp32."""
    monkeypatch.setattr("openvino.Core", CoreOnBf16)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if limit is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert has_bf16.__wrapped__() is used


def test_openvino_needs_no_torchvision(converted: Path) -> None:
    """1.5 s and 170 MB for every worker."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from handler.engines import load_engine\n"
        "from handler.image_classifier import ImageClassifier\n"
        "from handler.model_card import ModelCard\n"
        "from handler.settings import Settings\n"
        f"folder = Path({str(converted)!r})\n"
        "card, settings = ModelCard.read(folder), Settings(device='cpu')\n"
        "assert load_engine(card, folder, settings, None, 1).name.startswith('openvino')\n"
        "heavy = {'torchvision', 'torch._dynamo', 'onnxruntime', 'nncf'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=ROOT)


def test_tensors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = make_model_dir(tmp_path)
    state = load_file(folder / WEIGHTS_FILE)
    del state["features.0.weight"]
    save_file(state, folder / WEIGHTS_FILE)
    with pytest.raises(RuntimeError, match=r"features\.0\.weight"):
        load(folder)


def test_labels_decide_the_number_of_classes(tmp_path: Path) -> None:
    card = replace(tiny_card(), labels=("a", "b", "c", "d"))
    model_dir = make_model_dir(tmp_path)
    (model_dir / GOLDEN_FILE).unlink()  # its labels are others
    with pytest.raises(RuntimeError, match="size mismatch"):
        load(model_dir, card)


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
    assert torch.get_num_threads() == share_of_cores(settings, workers) == used


@pytest.mark.gpu
def test_torch_has_one_thread_beside_a_gpu(tmp_path: Path) -> None:
    """The others decode."""
    settings = Settings(device="cuda", threads=3)
    load_engine(tiny_card(), make_model_dir(tmp_path), settings, gpu_id=0, workers=1)
    assert torch.get_num_threads() == 1
    assert share_of_cores(settings, workers=1) == 3


# --- The machine


@NO_GPU
def test_a_gpu_that_torch_does_not_see_is_none() -> None:
    assert find_hardware(0) == find_hardware() == Hardware(cpu_bf16=has_bf16())


@pytest.mark.gpu
@pytest.mark.parametrize("gpu_id", [None, 0])
def test_the_gpu_of_a_worker(gpu_id: int | None) -> None:
    hardware = find_hardware(gpu_id)
    assert hardware.gpu == 0
    assert hardware.capability >= (7, 0)


# --- One interface


def test_a_launch_is_the_same_as_a_call() -> None:
    engine, images = eager(), pixels()
    wait = engine.launch(list(images))
    assert np.array_equal(wait(), engine.probabilities(images).numpy())
    assert not engine.is_lost()


@pytest.mark.gpu
def test_gpu_gives_the_same_probabilities() -> None:
    on_gpu = eager(device="cuda:0").probabilities(pixels())
    torch.testing.assert_close(on_gpu, reference(), rtol=0, atol=1e-3)
