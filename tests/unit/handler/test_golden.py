"""Golden images: which engines give the reference's answers, and what is done about others."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle
from math import isnan, nan
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms._presets import ImageClassification

from handler import engines
from handler.engine import Engine
from handler.engines import load_engine
from handler.errors import InvalidModel
from handler.golden import GOLDEN_FILE, MAX_ERROR, Golden, limit_of
from handler.selection import Hardware
from handler.settings import Settings
from handler.torch_engine import TorchEager
from service.archive.golden import draw_images, make_golden
from tests.unit.tiny import LABELS, make_model_dir, tiny_card, tiny_golden, tiny_network

TRANSFORM = replace(tiny_card().transform, resize_size=72, crop_size=64)
PRESET = ImageClassification(resize_size=72, crop_size=64)
HOPPER = Hardware(gpu=0, capability=(9, 0))


@pytest.fixture(scope="module")
def golden() -> Golden:
    return make_golden(tiny_network(), PRESET, LABELS)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("golden"))


class Fake(Engine):
    """Gives the probabilities that it is made with, a row for each image, whatever they show."""

    def __init__(self, probabilities: Tensor, precision: str = "fp32") -> None:
        super().__init__("fake", precision, "cpu", len(probabilities))
        self._rows = cycle(probabilities)
        self.passes: list[int] = []

    def probabilities(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def launch(self, images: Sequence[Tensor]) -> Callable[[], NDArray[np.float32]]:
        self.passes.append(len(images))
        return torch.stack([next(self._rows) for _ in images]).numpy


def made_up(logits: list[list[float]]) -> Golden:
    return Golden({}, torch.zeros(len(logits), 3, 8, 8).byte(), torch.tensor(logits), ())


def test_drawn_images_are_always_the_same_and_all_different() -> None:
    images = draw_images(64)
    assert images == draw_images(64)
    assert len(set(images.values())) == len(images) == 8


def test_reference_pixels_are_those_of_the_model(golden: Golden) -> None:
    assert golden.pixels.shape == (8, 3, 64, 64)
    assert golden.pixels.dtype == torch.uint8
    assert golden.pixels.float().std(dim=(1, 2, 3)).min() > 10
    assert set(golden.labels) <= set(LABELS)


def test_an_archive_gives_them_back(model_dir: Path) -> None:
    found = Golden.read(model_dir)
    assert found
    expected = tiny_golden()
    assert (found.files, found.labels) == (expected.files, expected.labels)
    assert found.pixels.equal(expected.pixels)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-4)


def test_an_archive_without_them_is_not_checked(tmp_path: Path) -> None:
    (make_model_dir(tmp_path) / GOLDEN_FILE).unlink()
    assert Golden.read(tmp_path) is None
    settings = Settings(device="cpu")
    assert load_engine(tiny_card(), tmp_path, settings, None, workers=1).sameness is None


@pytest.mark.parametrize(("precision", "least", "most"), [("fp32", 0, 1e-5), ("bf16", 1e-5, 0.05)])
def test_error_is_that_of_the_precision(
    golden: Golden, precision: str, least: float, most: float
) -> None:
    engine = TorchEager(tiny_network(), TRANSFORM, precision, max_forward=3)
    assert least <= golden.compare(engine).error <= most


def test_most_requests_pass_of_one_image_is_compared_too(golden: Golden) -> None:
    engine = Fake(golden.logits.softmax(dim=1))
    assert golden.compare(engine).fits(limit_of("fp32"))
    assert engine.passes == [1, len(golden.files) - 1]


def test_error_is_a_share_of_what_the_answers_say() -> None:
    """Logits of (2, 0, -2) as (2.2, 0, -2.2) are off by a tenth, whatever a softmax adds."""
    golden, actual = made_up([[2.0, 0.0, -2.0]]), torch.tensor([[2.2, 0.0, -2.2]])
    found = golden.judge((actual + 5).softmax(dim=1))
    assert found.error == pytest.approx(0.1, rel=1e-4)
    assert (found.agreement, found.loss) == (1, 0)


def test_another_class_fits_only_if_the_two_were_nearly_as_likely() -> None:
    others = [[0.0, -1.0, 1.0]] * 99
    golden = made_up([[2.0, 1.9, -3.9], *others])
    near = golden.judge(torch.tensor([[1.9, 2.0, -3.9], *others]).softmax(dim=1))
    assert near.agreement == 0.99
    assert near.fits(MAX_ERROR)
    far = golden.judge(torch.tensor([[2.0, 1.9, 2.1], *others]).softmax(dim=1))
    assert far.agreement == 0.99
    assert far._replace(loss=0).fits(1)
    assert not far.fits(1)


def test_another_network_or_other_inputs_are_far_off(golden: Golden) -> None:
    other = tiny_network()
    with torch.no_grad():
        next(other.parameters()).mul_(1.5)
    shifted = replace(TRANSFORM, mean=(0.0, 0.0, 0.0))
    right = TorchEager(tiny_network(), TRANSFORM)
    assert golden.compare(TorchEager(other, TRANSFORM)).error > MAX_ERROR
    assert golden.compare(right, golden.pixels.flip(1)).error > MAX_ERROR
    assert golden.compare(TorchEager(tiny_network(), shifted)).error > MAX_ERROR


def test_no_number_is_no_answer(golden: Golden) -> None:
    probabilities = golden.logits.softmax(dim=1)
    probabilities[3] = nan
    found = golden.judge(probabilities)
    assert isnan(found.error)
    assert not found.fits(1e9)


def test_a_network_to_which_all_classes_are_alike_can_be_served() -> None:
    golden = made_up([[0.0] * 1000] * 8)
    alike = torch.full((8, 1000), 1 / 1000)
    assert golden.judge(alike).fits(limit_of("fp32"))
    assert golden.judge(alike * (1 + 1e-6)).fits(limit_of("fp32"))


# --- What `auto` takes


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch, model_dir: Path) -> set[str]:
    """Precisions in which a GPU, which need not be there, gives NaN."""
    golden = Golden.read(model_dir)
    assert golden
    found: set[str] = set()

    def load(_card: object, _dir: object, _chosen: object, precision: str, *_: object) -> Engine:
        answers = golden.logits.softmax(dim=1)
        return Fake(answers * (nan if precision in found else 1), precision)

    monkeypatch.setattr(engines, "_load", load)
    monkeypatch.setattr(engines, "find_hardware", lambda _: HOPPER)
    return found


def load(model_dir: Path, precision: str = "auto") -> Engine:
    return load_engine(tiny_card(), model_dir, Settings(precision=precision), 0, workers=1)


@pytest.mark.parametrize(
    ("wrong", "taken"), [((), "fp16"), (("fp16",), "bf16"), (("fp16", "bf16"), "fp32")]
)
def test_auto_takes_the_first_that_gives_the_references_answers(
    broken: set[str], model_dir: Path, wrong: tuple[str, ...], taken: str
) -> None:
    broken.update(wrong)
    engine = load(model_dir)
    assert engine.precision == taken
    assert engine.sameness
    assert engine.sameness.error < 1e-6
    assert [*engine.refused] == [f"fake-{precision}" for precision in wrong]


def test_a_precision_that_was_asked_for_is_refused_if_it_gives_no_numbers(
    broken: set[str], model_dir: Path
) -> None:
    broken.add("fp16")
    with pytest.raises(InvalidModel, match=r"^precision: fake-fp16 gives no numbers"):
        load(model_dir, "fp16")


@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_other_answers_in_fp32_stop_the_start(
    broken: set[str], model_dir: Path, precision: str
) -> None:
    broken.update(("fp16", "bf16", "fp32"))
    with pytest.raises(
        InvalidModel, match=r"^engine: fake-fp32 computes something else than the network"
    ):
        load(model_dir, precision)
