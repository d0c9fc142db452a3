"""Checkpoints and labels as people have them: packaged, and answered from the archive."""

import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torchvision.transforms.functional import normalize

from handler.engines import load_engine
from handler.model_card import ModelCard
from handler.networks import get_recipe
from handler.settings import Settings
from scripts.package import main
from service.archive.packaging import package
from tests.unit.service.planning import planned
from tests.unit.tiny import ARCHITECTURE, tiny_network

LABELS = "heron\ncrane\nowl\n"
SEEDED = torch.Generator().manual_seed(7)
IMAGES = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8, generator=SEEDED)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TS_MODEL_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("CI", "true")  # main sets it; this takes it back
    return tmp_path / "store"


def arguments(folder: Path, content: Any, *argv: str, model: str = ARCHITECTURE) -> list[str]:
    torch.save(content, folder / "birds.ckpt")
    if not (folder / "birds.txt").exists():
        (folder / "birds.txt").write_text(LABELS)
    files = ["--weights", str(folder / "birds.ckpt"), "--labels", str(folder / "birds.txt")]
    return ["--model", model, *files, "--workers", "1", *argv]


def refusal(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line, after whatever was said before it."""
    assert main(argv) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def answers(archive: Path, **settings: Any) -> Tensor:
    """Probabilities of IMAGES, from what is in an archive."""
    folder = archive.parent / "unpacked"
    with zipfile.ZipFile(archive) as content:
        content.extractall(folder)
    chosen = Settings(device="cpu", precision="fp32", **settings)
    engine = load_engine(ModelCard.read(folder), folder, chosen, None, workers=2)
    return torch.cat([engine.probabilities(image[None]) for image in IMAGES])


def logits(network: nn.Module, architecture: str = ARCHITECTURE) -> Tensor:
    """What torchvision's network gives for IMAGES, normalised by the recipe."""
    preset = get_recipe(architecture).transforms()
    with torch.no_grad():
        return network.eval()(normalize(IMAGES / 255, preset.mean, preset.std))


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def test_a_lightning_checkpoint_is_served(
    tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = tiny_network()
    optimizer = torch.optim.SGD(network.parameters(), momentum=0.9, lr=0.1)
    content = {
        "epoch": 3,
        "global_step": 120,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": under("model._orig_mod.", dict(network.state_dict()))
        | {"criterion.weight": torch.ones(3)},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4}}}},
        "callbacks": {
            "ModelCheckpoint{'monitor': 'val_loss'}": {"best_k_models": {}, "mode": "min"}
        },
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 0.1, "data": Path("birds")},
    }
    assert main(arguments(tmp_path, content)) == 0
    said = capsys.readouterr().err
    assert "birds.ckpt: the weights are those under 'state_dict.model._orig_mod.'\n" in said
    assert "birds.ckpt: not used: loops, callbacks, optimizer_states, lr_schedulers" in said
    actual = answers(store / f"{ARCHITECTURE}.mar")
    probabilities = logits(network).softmax(1)
    assert (actual - probabilities).abs().max() < 1e-3
    assert probabilities.std(dim=1).min() > 0.01  # so that other weights would show


def test_averages_beside_the_weights_are_a_choice(
    tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint as torchvision's references write it."""
    network = tiny_network()
    average = AveragedModel(network, use_buffers=True)
    with torch.no_grad():
        for parameter in average.module.parameters():
            parameter.mul_(0.9)
    content = {
        "model": network.state_dict(),
        "model_ema": average.state_dict(),
        "epoch": 5,
        "args": Namespace(lr=0.1, output_dir=Path("runs")),
    }
    argv = arguments(tmp_path, content)
    assert refusal(argv, capsys).endswith(
        f"birds.ckpt: holds 2 different sets of weights that fit {ARCHITECTURE}; choose one: "
        "--weights-prefix 'model' or --weights-prefix 'model_ema.module'"
    )
    assert main([*argv, "--weights-prefix", "model_ema.module"]) == 0
    actual = answers(store / f"{ARCHITECTURE}.mar")
    assert (actual - logits(average.module).softmax(1)).abs().max() < 1e-3
    assert (actual - logits(network).softmax(1)).abs().max() > 0.01


def test_a_network_of_one_output_answers_its_sigmoid(
    tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = tiny_network(classes=1)
    with torch.no_grad():
        last = network.get_submodule("classifier.1")
        assert isinstance(last, nn.Conv2d)
        assert last.bias is not None
        last.weight.div_(60)
        last.bias.fill_(0.1)
    (tmp_path / "birds.txt").write_text("heron\n")
    argv = arguments(tmp_path, network.state_dict())
    message = refusal(argv, capsys)
    assert "it has one output, and with a softmax its confidence is 1.0 for every image" in message
    (tmp_path / "birds.txt").write_text("none\nheron\n")
    assert main(argv) == 0
    assert "its sigmoid is the confidence of class 1, 'heron'" in capsys.readouterr().err
    yes = logits(network).sigmoid()
    actual = answers(store / f"{ARCHITECTURE}.mar")
    assert (actual - torch.cat([1 - yes, yes], 1)).abs().max() < 1e-4
    assert (yes < 0.999).all()


def test_googlenet_is_served_as_it_was_built(
    tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    network = torchvision.models.googlenet(num_classes=3, init_weights=False, transform_input=True)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # one pass in training mode gives them what they see
    with torch.no_grad():
        network(torch.randn(8, 3, 224, 224))
        network.fc.weight.mul_(0.3)
    argv = arguments(tmp_path, network.state_dict(), model="googlenet")
    message = refusal(argv, capsys)
    assert "say --transform-input on if torchvision built it with pretrained weights" in message
    assert main([*argv, "--transform-input", "on"]) == 0
    actual = answers(store / "googlenet.mar")
    expected = logits(network, "googlenet").softmax(1)
    network.transform_input = False
    other = logits(network, "googlenet").softmax(1)
    assert (actual - expected).abs().max() < 1e-3 < 1e-2 < (other - expected).abs().max()


def test_mnasnet_is_packaged_and_loaded(tmp_path: Path) -> None:
    """By torch alone too, whose loading asks for a version that plain tensors lack."""
    torch.manual_seed(0)
    network = torchvision.models.mnasnet0_5(num_classes=3).eval()
    argv = arguments(tmp_path, dict(network.state_dict()), model="mnasnet0_5")
    archive = package(planned(tmp_path / "store", *argv, model="mnasnet0_5"))
    expected = logits(network, "mnasnet0_5").softmax(1)
    for engine in ("openvino", "torch"):
        assert (answers(archive, engine=engine) - expected).abs().max() < 1e-3


@pytest.mark.parametrize("engine", ["auto", "torch"])
def test_what_is_no_number_is_refused_at_packaging(
    tmp_path: Path,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    engine: str,
) -> None:
    (tmp_path / "default.yaml").write_text(f"batchSize: 1\nhandler: {{engine: {engine}}}\n")
    monkeypatch.setattr("service.plan.CONFIGS", tmp_path)
    state = tiny_network().state_dict()
    state["features.0.weight"][0, 0, 0, 0] = float("nan")
    message = refusal(arguments(tmp_path, state), capsys)
    assert "features.0.weight holds 1 numbers of 1728 that are NaN or infinite" in message
    state["features.0.weight"][0, 0, 0, 0] = 1.0
    state["features.0.weight"] *= 1e30  # numbers, whose products are none
    state["features.3.squeeze.weight"] *= 1e30
    message = refusal(arguments(tmp_path, state), capsys)
    assert "its answers are NaN, although each weight is a number" in message
    assert not [*store.glob("*.mar")]
