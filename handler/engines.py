"""A model ready to run. Nothing outside this module knows an inference library.

An engine takes images as bytes of pixels and gives probabilities; normalisation is its business.
"""

from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from handler.errors import InvalidSettings
from handler.images import InputTransform
from handler.machine import available_cores
from handler.model_card import WEIGHTS_FILE, ModelCard
from handler.networks import empty_network, get_recipe
from handler.settings import Settings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Engine(Protocol):
    """What the handler needs of any inference library."""

    name: str  # library and precision, e.g. "torch-fp32"
    precision: str
    device: str  # "cpu" or "cuda:0"

    def probabilities(self, images: Tensor) -> Tensor:
        """uint8 RGB [B, 3, H, W] on the CPU -> float32 [B, C] on the CPU, each row summing to 1."""


class TorchEager:
    """torch without compilation: the reference that every other engine is held against."""

    def __init__(
        self, network: torch.nn.Module, transform: InputTransform, precision: str, device: str
    ) -> None:
        self.name = f"torch-{precision}"
        self.precision = precision
        self.device = device
        self._dtype = DTYPES[precision]
        self._network = network.to(device, self._dtype).eval()
        # (x / 255 - mean) / std as one subtraction and one division by constants in pixel units
        self._mean = 255 * torch.tensor(transform.mean, device=device).view(3, 1, 1)
        self._std = 255 * torch.tensor(transform.std, device=device).view(3, 1, 1)

    @torch.inference_mode()
    def probabilities(self, images: Tensor) -> Tensor:
        """uint8 RGB [B, 3, H, W] on the CPU -> float32 [B, C] on the CPU."""
        pixels = images.to(self.device, torch.float32)
        normalised = pixels.sub_(self._mean).div_(self._std)
        logits = self._network(normalised.to(self._dtype))
        return logits.float().softmax(dim=1).cpu()


def check_precision(settings: Settings) -> None:
    """Raise InvalidSettings for a precision that no engine here offers."""
    if settings.precision == "int8":
        raise InvalidSettings(
            "precision must be auto, fp32 or bf16 (this version has no int8 engine), got 'int8'"
        )


def choose_device(settings: Settings, gpu_id: int | None) -> str:
    """The device of a worker: TorchServe's `gpu_id` where there is one and it is wanted.

    Raises InvalidSettings where a GPU is demanded and there is none.
    """
    if settings.device != "cpu" and torch.cuda.is_available():
        return f"cuda:{gpu_id or 0}"
    if settings.device == "cuda":
        raise InvalidSettings("device is cuda, and torch sees no GPU here")
    return "cpu"


def load_engine(
    card: ModelCard,
    model_dir: Path,
    settings: Settings,
    gpu_id: int | None,
    workers: int,
) -> Engine:
    """The engine that the settings ask for, with the archive's weights.

    `workers` is the number of processes that share the cores. Raises InvalidSettings, and
    RuntimeError where the archive's tensors do not fit its architecture (packaging checked that).
    """
    check_precision(settings)
    device = choose_device(settings, gpu_id)
    torch.set_num_threads(settings.threads or max(1, available_cores() // max(1, workers)))
    recipe = get_recipe(card.architecture, card.recipe)
    state = load_file(model_dir / WEIGHTS_FILE)
    # Built without memory and given the file's tensors, so no random weights are drawn first.
    network = empty_network(recipe, card.architecture, len(card.labels))
    network.load_state_dict(state, assign=True)
    precision = "fp32" if settings.precision == "auto" else settings.precision
    return TorchEager(network, InputTransform.from_recipe(recipe), precision, device)
