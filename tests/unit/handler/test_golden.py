"""Golden images: which engines give the network's own answers, and what is done about others."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import isnan, nan
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from handler import engines
from handler.engine import Engine
from handler.engines import load_engine
from handler.errors import InvalidModel
from handler.golden import GOLDEN_FILE, MAX_ERROR, Golden
from handler.selection import Hardware
from handler.settings import Settings
from handler.torch_engine import TorchEager
from service.archive.golden import draw_images, make_golden
from tests.unit.tiny import make_model_dir, tiny_card, tiny_network

TRANSFORM = replace(tiny_card().transform, resize_size=72, crop_size=64)
HOPPER = Hardware(gpu=0, capability=(9, 0))


@pytest.fixture(scope="module")
def golden() -> Golden:
    return make_golden(tiny_network(), TRANSFORM)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("golden"))


class Fake(Engine):
    """Gives the probabilities that it is made with, whatever the images are."""

    def __init__(self, probabilities: Tensor, precision: str = "fp32") -> None:
        super().__init__("fake", precision, "cpu", len(probabilities))
        self._probabilities = probabilities

    def probabilities(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def launch(self, images: Sequence[Tensor]) -> Callable[[], NDArray[np.float32]]:
        return self._probabilities.numpy


def test_images_are_always_the_same_and_all_different() -> None:
    images = draw_images(64)
    assert images.shape == (8, 3, 64, 64)
    assert images.dtype == torch.uint8
    assert images.equal(draw_images(64))
    assert len({image.numpy().tobytes() for image in images}) == 8
    assert images.float().std(dim=(1, 2, 3)).min() > 10


def test_an_archive_gives_them_back(model_dir: Path) -> None:
    found = Golden.read(model_dir)
    assert found
    expected = make_golden(tiny_network(), tiny_card().transform)
    assert found.images.equal(expected.images)
    torch.testing.assert_close(found.probabilities, expected.probabilities, rtol=0, atol=1e-6)


def test_an_archive_without_them_is_not_checked(tmp_path: Path) -> None:
    (make_model_dir(tmp_path) / GOLDEN_FILE).unlink()
    assert Golden.read(tmp_path) is None
    settings = Settings(device="cpu")
    assert load_engine(tiny_card(), tmp_path, settings, None, workers=1).golden_error is None


@pytest.mark.parametrize(("precision", "least", "most"), [("fp32", 0, 1e-5), ("bf16", 1e-5, 0.05)])
def test_error_is_that_of_the_precision(
    golden: Golden, precision: str, least: float, most: float
) -> None:
    engine = TorchEager(tiny_network(), TRANSFORM, precision, max_forward=3)
    assert least <= golden.error(engine) <= most


def test_error_is_a_share_of_what_the_answers_say(golden: Golden) -> None:
    """Logits of (2, 0, -2) as (2.2, 0, -2.2) are off by a tenth, whatever a softmax adds."""
    expected = torch.tensor([[2.0, 0.0, -2.0]])
    golden = Golden(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), expected.softmax(dim=1))
    assert golden.error(Fake((1.1 * expected + 5).softmax(dim=1))) == pytest.approx(0.1, rel=1e-4)


def test_another_network_or_other_inputs_are_far_off(golden: Golden) -> None:
    other = tiny_network()
    with torch.no_grad():
        next(other.parameters()).mul_(1.5)
    bgr = Golden(golden.images.flip(1), golden.probabilities)
    shifted = replace(TRANSFORM, mean=(0.0, 0.0, 0.0))
    assert golden.error(TorchEager(other, TRANSFORM)) > MAX_ERROR
    assert bgr.error(TorchEager(tiny_network(), TRANSFORM)) > MAX_ERROR
    assert golden.error(TorchEager(tiny_network(), shifted)) > MAX_ERROR


def test_no_number_is_no_answer(golden: Golden) -> None:
    probabilities = golden.probabilities.clone()
    probabilities[3] = nan
    assert isnan(golden.error(Fake(probabilities)))


def test_a_network_to_which_all_classes_are_alike_can_be_served() -> None:
    alike = torch.full((8, 1000), 1 / 1000)
    golden = Golden(draw_images(8), alike)
    assert golden.error(Fake(alike)) <= MAX_ERROR
    assert golden.error(Fake(alike * (1 + 1e-6))) <= MAX_ERROR


# --- What `auto` takes


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch, model_dir: Path) -> set[str]:
    """Precisions in which a GPU, which need not be there, gives NaN."""
    golden = Golden.read(model_dir)
    assert golden
    found: set[str] = set()

    def load(_card: object, _dir: object, _chosen: object, precision: str, *_: object) -> Engine:
        return Fake(golden.probabilities * (nan if precision in found else 1), precision)

    monkeypatch.setattr(engines, "_load", load)
    monkeypatch.setattr(engines, "find_hardware", lambda _: HOPPER)
    return found


def load(model_dir: Path, precision: str = "auto") -> Engine:
    return load_engine(tiny_card(), model_dir, Settings(precision=precision), 0, workers=1)


@pytest.mark.parametrize(
    ("wrong", "taken"), [((), "fp16"), (("fp16",), "bf16"), (("fp16", "bf16"), "fp32")]
)
def test_auto_takes_the_first_that_gives_the_networks_answers(
    broken: set[str], model_dir: Path, wrong: tuple[str, ...], taken: str
) -> None:
    broken.update(wrong)
    engine = load(model_dir)
    assert engine.precision == taken
    assert engine.golden_error == 0
    assert [*engine.refused] == [f"fake-{precision}" for precision in wrong]


def test_a_precision_that_was_asked_for_is_kept(broken: set[str], model_dir: Path) -> None:
    broken.add("fp16")
    engine = load(model_dir, "fp16")
    assert engine.precision == "fp16"
    assert engine.golden_error is not None
    assert isnan(engine.golden_error)


@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_other_answers_in_fp32_stop_the_start(
    broken: set[str], model_dir: Path, precision: str
) -> None:
    broken.update(("fp16", "bf16", "fp32"))
    with pytest.raises(InvalidModel, match="gives other answers than the network that was pack"):
        load(model_dir, precision)
