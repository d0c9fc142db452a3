"""OpenVINO, the engine for CPUs."""

import os
from functools import cache
from pathlib import Path

import openvino
import torch
from torch import Tensor

from handler.engine import Engine
from handler.errors import InvalidModel

# Values of ONEDNN_MAX_CPU_ISA under which oneDNN, with which OpenVINO computes, only emulates bf16.
LIMITS_WITHOUT_BF16 = "SSE41 AVX AVX2 AVX2_VNNI AVX2_VNNI_2 AVX512_CORE AVX512_CORE_VNNI".split()


class OpenVino(Engine):
    """OpenVINO on the CPU, compiled for one image and for `max_forward` images.

    Fixed sizes, because a model with a free batch size takes a tenth longer.
    """

    def __init__(
        self, model_file: Path, precision: str, threads: int = 1, max_forward: int = 1
    ) -> None:
        """Raises InvalidModel if OpenVINO cannot read the file."""
        super().__init__("openvino", precision, "cpu", max_forward)
        core = openvino.Core()
        options = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            # Two workers of one thread each would pin themselves to the same core.
            "ENABLE_CPU_PINNING": False,
            # The parts of an int8 model that stay in floating point use bf16 if the CPU has it.
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
