"""The GPU of a worker: made visible, and watched through NVIDIA's management library (NVML).

NVML is imported only if there is a GPU. It numbers all GPUs of the machine in an order of its own,
so torch's number of a device must not be used as NVML's.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

VISIBLE = "CUDA_VISIBLE_DEVICES"
WORKERS_VISIBLE = "WORKERS_CUDA_VISIBLE_DEVICES"  # service/torchserve/gpus.py sets it
SECONDS = 5.0  # between two readings

MEMORY_USED = "classifier_gpu_memory_used_bytes"
MEMORY_TOTAL = "classifier_gpu_memory_total_bytes"
UTILIZATION = "classifier_gpu_utilization_ratio"

Gauge = tuple[str, float, tuple[str, ...]]  # name, value, label values


def restore_visible(environ: MutableMapping[str, str] = os.environ) -> None:
    """Give CUDA_VISIBLE_DEVICES its own value back, which TorchServe's frontend cannot read."""
    if WORKERS_VISIBLE in environ:
        environ[VISIBLE] = environ.pop(WORKERS_VISIBLE)


def open_gauges(device: str) -> Callable[[], Iterable[Gauge]]:
    """What gives the gauges of "cuda:0", every 5 s; of "cpu", or without NVML, there are none."""
    if not device.startswith("cuda"):
        return tuple
    index = int(device.partition(":")[2] or 0)
    try:
        import pynvml
        import torch

        pynvml.nvmlInit()
        properties = torch.cuda.get_device_properties(index)
        handle = find_gpu(pynvml, index, properties, os.environ.get(VISIBLE, ""))
    except Exception as exc:  # the model runs all the same
        print(f"no metrics of the GPU: {type(exc).__name__}: {exc}", file=sys.stderr)
        return tuple
    return GpuGauges(pynvml, handle, index)


def find_gpu(nvml: Any, index: int, properties: Any, visible: str) -> Any:
    """NVML's handle of torch's device `index`, which has `properties`. Raises NVMLError.

    A MIG device is known by the name that CUDA_VISIBLE_DEVICES has for it: torch may see the UUID
    of the whole card. Any other GPU is known by its UUID.
    """
    names = visible.split(",")
    if index < len(names) and names[index].strip().startswith("MIG-"):
        return nvml.nvmlDeviceGetHandleByUUID(names[index].strip())
    return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")


@dataclass
class GpuGauges:
    """Memory and utilisation of a whole GPU, whoever uses it."""

    nvml: Any
    handle: Any
    index: int
    clock: Callable[[], float] = time.monotonic
    due: float = 0.0  # when to read them again

    def __call__(self) -> Iterator[Gauge]:
        """The readings if they are due, without those that NVML cannot give now."""
        if self.clock() < self.due:
            return
        self.due = self.clock() + SECONDS
        labels = (str(self.index),)
        with suppress(self.nvml.NVMLError):
            memory = self.nvml.nvmlDeviceGetMemoryInfo(self.handle)
            yield MEMORY_USED, memory.used, labels
            yield MEMORY_TOTAL, memory.total, labels
            rates = self.nvml.nvmlDeviceGetUtilizationRates(self.handle)  # percent; not of MIG
            yield UTILIZATION, rates.gpu / 100, labels
