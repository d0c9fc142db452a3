"""Plans as ./scripts/package makes them, for a store of the test."""

from dataclasses import replace
from pathlib import Path

import torch
import torchvision

from service.options import parse_package
from service.plan import PackagePlan, plan_package
from service.torchserve.config import ServerConfig

MODEL = "squeezenet1_1"
RECIPE = "SqueezeNet1_1_Weights.IMAGENET1K_V1"


def planned(store: Path, *argv: str, model: str = MODEL) -> PackagePlan:
    """Of untrained weights and one worker, unless the options say otherwise."""
    given = ["--model", model, "--weights", "untrained", "--workers", "1", *argv]
    server = replace(ServerConfig.load(), model_store=store)
    return plan_package(model, parse_package(given), server)


def own_weights(folder: Path, classes: int, names: list[str]) -> list[str]:
    """Options for a fine-tuned model."""
    torch.manual_seed(0)
    network = torchvision.models.squeezenet1_1(num_classes=classes)
    torch.save({"state_dict": network.state_dict()}, folder / "birds.pth")
    (folder / "birds.txt").write_text("\n".join(names) + "\n")
    return [
        *("--weights", str(folder / "birds.pth"), "--labels", str(folder / "birds.txt")),
        *("--recipe", RECIPE),
    ]
