"""A model ready to run. Nothing outside this module and handler/cuda.py knows an inference library.

An engine takes images as bytes of pixels and gives probabilities; normalisation is its business.
"""

import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Protocol

import openvino
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from handler.errors import InvalidModel
from handler.machine import available_cores
from handler.model_card import (
    INT8_FILE,
    OPENVINO_FILE,
    WEIGHTS_FILE,
    InputTransform,
    ModelCard,
)
from handler.selection import Hardware, select
from handler.settings import Settings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Images in one forward pass where the settings do not say. On a CPU a few images run some percent
# faster together than one by one, and more leave its caches again.
MAX_FORWARD = {"cpu": 4, "cuda": 64}
LARGE_MODEL = 64 * 2**20  # bytes: a second compiled copy takes as much again, and gains nothing
# Values of ONEDNN_MAX_CPU_ISA under which oneDNN, with which OpenVINO computes, only emulates bf16.
LIMITS_WITHOUT_BF16 = "SSE41 AVX AVX2 AVX2_VNNI AVX2_VNNI_2 AVX512_CORE AVX512_CORE_VNNI".split()


class Engine(Protocol):
    """What the handler needs of any inference library."""

    name: str  # library and precision, e.g. "torch-fp32"
    precision: str
    device: str  # "cpu" or "cuda:0"
    max_forward: int  # images that one forward pass takes

    def probabilities(self, images: Tensor) -> Tensor:
        """uint8 RGB [B, 3, H, W] on the CPU -> float32 [B, C] on the CPU, each row summing to 1.

        B is 1 to `max_forward`.
        """

    def launch(self, images: Sequence[Tensor]) -> Callable[[], Tensor]:
        """Begin the same with images [3, H, W]; what is returned waits for the probabilities.

        An engine that computes on the CPU begins when it is waited for: there is nobody else to do
        it meanwhile.
        """
        return lambda: self.probabilities(torch.stack(list(images)))

    def is_lost(self) -> bool:
        """Whether nothing will ever run here again, asked after a failure."""
        return False


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
        precision: str,
        device: str,
        max_forward: int = 32,
    ) -> None:
        self.name = f"torch-{precision}"
        self.precision = precision
        self.device = device
        self.max_forward = max_forward
        exact_fp32(device)
        self._model = PixelsToProbabilities(network, transform, DTYPES[precision]).to(device).eval()

    def launch(self, images: Sequence[Tensor]) -> Callable[[], Tensor]:
        """Images may lie on the CPU or on the GPU."""
        return lambda: self.probabilities(torch.stack([image.to(self.device) for image in images]))

    @torch.inference_mode()
    def probabilities(self, images: Tensor) -> Tensor:
        """uint8 RGB [B, 3, H, W] on the CPU -> float32 [B, C] on the CPU."""
        return self._model(images.to(self.device)).cpu()


class OpenVino(Engine):
    """OpenVINO on the CPU, compiled for one image and for `max_forward` images.

    Fixed sizes, because a model with a free batch size takes a tenth longer.
    """

    def __init__(
        self, model_file: Path, precision: str, threads: int = 1, max_forward: int = 1
    ) -> None:
        """Raises InvalidModel where the file is none that OpenVINO can read."""
        self.name = f"openvino-{precision}"
        self.precision = precision
        self.device = "cpu"
        self.max_forward = max_forward
        core = openvino.Core()
        options = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            # Two workers of one thread each would pin themselves to the same core.
            "ENABLE_CPU_PINNING": False,
            # What int8 leaves in floating point takes bf16 where the CPU has it.
            "INFERENCE_PRECISION_HINT": "f32" if precision == "fp32" or not has_bf16() else "bf16",
        }
        self._requests = []  # largest first
        try:
            for images in sorted({1, max_forward}, reverse=True):
                model = core.read_model(model_file)
                _, *shape = model.input(0).partial_shape
                model.reshape([images, *shape])
                compiled = core.compile_model(model, "CPU", options)
                self._requests.append((images, compiled.create_infer_request()))
        except RuntimeError as exc:
            raise InvalidModel(f"{model_file.name} in the archive cannot be loaded") from exc

    def probabilities(self, images: Tensor) -> Tensor:
        """uint8 RGB [B, 3, H, W] -> float32 [B, C]."""
        parts = []
        start = 0
        for size, request in self._requests:
            while len(images) - start >= size:
                outputs = request.infer([images[start : start + size].numpy()], share_inputs=True)
                parts.append(torch.from_numpy(outputs[0]))  # a copy of the request's own memory
                start += size
        return torch.cat(parts)


@cache
def has_bf16() -> bool:
    """Whether the CPU computes in bf16 itself (AVX-512 BF16, AMX), so that OpenVINO would.

    OpenVINO names what the CPU has, even if the environment allows oneDNN less.
    """
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in LIMITS_WITHOUT_BF16:
        return False
    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def find_hardware(gpu_id: int | None = None) -> Hardware:
    """What this machine computes on; `gpu_id` is the GPU that TorchServe gave the worker."""
    if not torch.cuda.is_available():
        return Hardware(cpu_bf16=has_bf16())
    gpu = gpu_id or 0
    capability = torch.cuda.get_device_capability(gpu)
    return Hardware(gpu=gpu, capability=capability, cpu_bf16=has_bf16())


def load_engine(
    card: ModelCard,
    model_dir: Path,
    settings: Settings,
    gpu_id: int | None,
    workers: int,
) -> Engine:
    """The engine that the settings ask for, with the archive's weights.

    `gpu_id` is the GPU that TorchServe gave this worker, and `workers` the number of processes that
    share the cores. Raises InvalidSettings or
    InvalidModel, and RuntimeError if the archive's tensors do not fit its architecture
    (packaging checked that).
    """
    converted = (model_dir / OPENVINO_FILE).exists()
    chosen = select(
        settings, find_hardware(gpu_id), converted=converted, int8=card.int8 is not None
    )
    threads = settings.threads or max(1, available_cores() // max(1, workers))
    torch.set_num_threads(threads)  # for decoding as well
    if chosen.engine == "openvino":
        model_file = model_dir / (INT8_FILE if chosen.precision == "int8" else OPENVINO_FILE)
        large = model_file.with_suffix(".bin").stat().st_size > LARGE_MODEL
        max_forward = settings.max_forward or (1 if large else MAX_FORWARD["cpu"])
        return OpenVino(model_file, chosen.precision, threads, max_forward)
    max_forward = settings.max_forward or MAX_FORWARD[chosen.device.partition(":")[0]]
    network = _load_network(card, model_dir)
    if chosen.engine == "cuda":
        from handler.cuda import Cuda  # what it imports only GPUs need

        return Cuda(network, card.transform, chosen.precision, chosen.device, max_forward)
    return TorchEager(network, card.transform, chosen.precision, chosen.device, max_forward)


def _load_network(card: ModelCard, model_dir: Path) -> nn.Module:
    # torchvision takes 1.5 s and 170 MB to import, and OpenVINO does not need it.
    from handler.networks import empty_network, get_recipe, load_state

    # Built without memory and given the file's tensors, so no random weights are drawn first.
    recipe = get_recipe(card.architecture, card.recipe)
    network = empty_network(recipe, card.architecture, len(card.labels))
    load_state(network, load_file(model_dir / WEIGHTS_FILE))
    return network
