"""torch without compilation, and the network that its engines share."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from handler.engine import Engine
from handler.inspection import Inspection, inspect
from handler.model_card import InputTransform

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class PixelsToProbabilities(nn.Module):
    """A network between normalisation and softmax: uint8 [B, 3, H, W] to float32 [B, C]."""

    _mean: Tensor
    _std: Tensor

    def __init__(self, network: nn.Module, transform: InputTransform, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = network.to(dtype)
        self._dtype = dtype
        # (x / 255 - mean) / std as one subtraction and one division by constants in pixel units
        self.register_buffer("_mean", 255 * torch.tensor(transform.mean).view(3, 1, 1))
        self.register_buffer("_std", 255 * torch.tensor(transform.std).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        normalised = (images.float() - self._mean) / self._std
        return self.network(normalised.to(self._dtype)).float().softmax(dim=1)


def exact_fp32(device: str) -> None:
    """Let a GPU compute fp32 in fp32: torch's default for convolutions is TF32, of 10 bits."""
    if device != "cpu":
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")  # TorchServe's base handler says "high"


class TorchEager(Engine):
    """torch without compilation: the reference that every other engine is held against."""

    def __init__(
        self,
        network: nn.Module,
        transform: InputTransform,
        precision: str = "fp32",
        device: str = "cpu",
        max_forward: int = 32,
    ) -> None:
        super().__init__("torch", precision, device, max_forward)
        exact_fp32(device)
        self._model = PixelsToProbabilities(network, transform, DTYPES[precision]).to(device).eval()
        self._size = transform.crop_size

    def launch(self, images: Sequence[Tensor]) -> Callable[[], NDArray[np.float32]]:
        """Images may lie on the CPU or on the GPU."""
        return super().launch([image.to(self.device) for image in images])

    @torch.inference_mode()
    def probabilities(self, images: Tensor) -> Tensor:
        """uint8 RGB [B, 3, H, W] on the CPU -> float32 [B, C] on the CPU."""
        return self._model(images.to(self.device)).cpu()

    def _prepare_inspection(self) -> None:
        self.inspect(torch.zeros(1, 3, self._size, self._size, dtype=torch.uint8))

    def inspect(self, images: Tensor) -> Inspection:
        """Images may lie on the CPU or on the GPU."""
        return inspect(self._model, images.to(self.device))
