"""OpenVINO, the engine for CPUs."""

import os
from collections.abc import Callable, Sequence
from functools import cache, cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import openvino
import torch
from numpy.typing import NDArray
from torch import Tensor

from handler.engine import Engine
from handler.errors import InvalidModel
from handler.inspection import Inspection
from handler.openvino_inspection import Inspector

# Values of ONEDNN_MAX_CPU_ISA under which oneDNN, with which OpenVINO computes, only emulates bf16.
LIMITS_WITHOUT_BF16 = "SSE41 AVX AVX2 AVX2_VNNI AVX2_VNNI_2 AVX512_CORE AVX512_CORE_VNNI".split()


class Request(NamedTuple):
    """A compiled model of a fixed size with the arrays that it reads and writes."""

    infer: Callable[[], object]
    images: NDArray[np.uint8]  # [size, 3, H, W]
    probabilities: NDArray[np.float32]  # [size, C]


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
        self._model_file = model_file
        self._options = options = {
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
                self._requests.append(_request(compiled.create_infer_request()))
        except RuntimeError as exc:
            raise InvalidModel(f"{model_file.name} in the archive cannot be loaded") from exc

    def probabilities(self, images: Tensor) -> Tensor:
        """uint8 RGB [B, 3, H, W] -> float32 [B, C]."""
        return torch.from_numpy(self._infer(images))

    def launch(self, images: Sequence[Tensor]) -> Callable[[], NDArray[np.float32]]:
        """As for every engine, without making one tensor of the images first."""
        return lambda: self._infer(images)

    def _infer(self, images: Sequence[Tensor] | Tensor) -> NDArray[np.float32]:
        """uint8 RGB, each [3, H, W] -> float32 [B, C]."""
        parts = []
        start = 0
        for request in self._requests:
            size = len(request.images)
            while len(images) - start >= size:
                for place in range(size):
                    request.images[place] = images[start + place].numpy()
                request.infer()
                parts.append(request.probabilities.copy())
                start += size
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _prepare_inspection(self) -> None:
        self._inspector  # noqa: B018

    @cached_property
    def _inspector(self) -> Inspector:
        """Compiled when somebody asks: it takes as much memory again as the model."""
        return Inspector(openvino.Core().read_model(self._model_file), self._options)

    def inspect(self, images: Tensor) -> Inspection:
        """One image after the other."""
        return self._inspector.run(images)


def _request(request: openvino.InferRequest) -> Request:
    """An inference request that reads and writes arrays of ours.

    Arrays given with each call would take Python a tenth of a millisecond to look through.
    """
    images = np.empty(request.get_input_tensor().shape, np.uint8)
    probabilities = np.empty(request.get_output_tensor().shape, np.float32)
    request.set_input_tensor(openvino.Tensor(images, shared_memory=True))
    request.set_output_tensor(openvino.Tensor(probabilities, shared_memory=True))
    return Request(partial(request.infer, share_outputs=True), images, probabilities)


@cache
def has_bf16() -> bool:
    """Whether the CPU computes in bf16 itself (AVX-512 BF16, AMX), so that OpenVINO would.

    OpenVINO names what the CPU has, even if the environment allows oneDNN less.
    """
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in LIMITS_WITHOUT_BF16:
        return False
    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
