"""The GPU of a worker: made visible, and watched through NVIDIA's management library (NVML).

NVML is imported where there is a GPU and nowhere else. It knows all GPUs of the machine, in an
order of its own, so torch's number of a device is never one of NVML's.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, MutableMapping
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


class GpuGauges:
    """Memory and utilisation of a whole GPU, whoever uses it."""

    def __init__(
        self, nvml: Any, handle: Any, index: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._nvml = nvml
        self._handle = handle
        self._labels = (str(index),)
        self._clock = clock
        self._next = clock()

    def __call__(self) -> list[Gauge]:
        """Readings, where it is time for some; of what NVML cannot tell now there is none."""
        if self._clock() < self._next:
            return []
        self._next = self._clock() + SECONDS
        gauges: list[Gauge] = []
        try:
            memory = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
            gauges.append((MEMORY_USED, memory.used, self._labels))
            gauges.append((MEMORY_TOTAL, memory.total, self._labels))
            rates = self._nvml.nvmlDeviceGetUtilizationRates(self._handle)  # percent; not of MIG
            gauges.append((UTILIZATION, rates.gpu / 100, self._labels))
        except self._nvml.NVMLError:
            pass
        return gauges
