"""A small model in an unpacked archive: three classes, seeded weights, sure answers."""

from dataclasses import replace
from pathlib import Path

import torch
from openvino import save_model
from safetensors.torch import save_file
from torch import nn

from handler.golden import Golden
from handler.model_card import (
    CARD_FILE,
    OPENVINO_FILE,
    WEIGHTS_FILE,
    ModelCard,
    WeightsFacts,
    file_sha256,
)
from handler.networks import build_network, get_recipe, input_transform
from service.archive.conversion import to_openvino
from service.archive.golden import make_golden

ARCHITECTURE = "squeezenet1_1"
RECIPE = get_recipe(ARCHITECTURE)
LABELS = ("heron", "crane", "crane")  # as in ImageNet, where two classes have one name


def tiny_network(architecture: str = ARCHITECTURE, classes: int = 3) -> nn.Module:
    """Seeded, and with a last layer steep enough that different pictures get different answers."""
    torch.manual_seed(1)
    network = build_network(get_recipe(architecture), architecture, classes)
    with torch.no_grad():
        last = [module for module in network.modules() if isinstance(module, nn.Conv2d)][-1]
        if architecture == ARCHITECTURE:
            last.weight.mul_(60)
            assert last.bias is not None
            last.bias.add_(3)
    return network


def tiny_card(architecture: str = ARCHITECTURE, trained: bool = True) -> ModelCard:
    return ModelCard(
        architecture=architecture,
        recipe=str(get_recipe(architecture)),
        transform=input_transform(get_recipe(architecture)),
        labels=LABELS,
        parameters={"total": 724_035, "trainable": 724_035},
        weights=WeightsFacts(
            name="birds.pth" if trained else "untrained",
            trained=trained,
            source="file" if trained else "seed 0",
            sha256="0" * 64,
        ),
        int8=None,
        inputs_sha256="1" * 64,
        code_sha256=("2" * 64, "3" * 64),
        packaged_with={"torch": torch.__version__},
        files={},
    )


def tiny_golden(architecture: str = ARCHITECTURE) -> Golden:
    preset = get_recipe(architecture).transforms()
    return make_golden(tiny_network(architecture), preset, LABELS)


def make_model_dir(
    folder: Path, architecture: str = ARCHITECTURE, trained: bool = True, openvino: bool = False
) -> Path:
    """What TorchServe unpacks for a worker, as far as our code reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: tensor.clone() for name, tensor in tiny_network(architecture).state_dict().items()
    }
    save_file(state, folder / WEIGHTS_FILE)
    tiny_golden(architecture).write(folder)
    if openvino:
        converted = to_openvino(tiny_network(architecture), tiny_card(architecture).transform)
        save_model(converted, folder / OPENVINO_FILE, compress_to_fp16=False)
    files = {path.name: file_sha256(path) for path in folder.iterdir() if path.is_file()}
    card = replace(tiny_card(architecture, trained), files=files)
    (folder / CARD_FILE).write_text(card.to_json(), "utf-8")
    return folder
