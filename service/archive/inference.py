"""Passes of an OpenVINO model over calibration images: single images, one on each core."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from handler.machine import available_cores

MAXIMUM_STREAMS = 8  # each holds the activations of an image
TIMED_IMAGES = 20

Image = NDArray[np.uint8]  # RGB [3, H, W]
Probabilities = NDArray[np.float32]  # [N, C]
T = TypeVar("T")


@dataclass(frozen=True)
class Measurement:
    """A model's answers to images, and the processor time of one: others may use the machine."""

    probabilities: Probabilities
    milliseconds: float


def stream_count() -> int:
    """How many images are computed at a time."""
    return min(available_cores(), MAXIMUM_STREAMS)


def compile_for_one(model: ov.Model, shape: Sequence[int], core: ov.Core) -> ov.CompiledModel:
    """The model, without bf16, for single images [3, H, W], each of which takes one core."""
    model = model.clone()
    model.reshape([1, *shape])
    options = {
        "INFERENCE_NUM_THREADS": stream_count(),
        "NUM_STREAMS": stream_count(),
        "ENABLE_CPU_PINNING": False,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    return core.compile_model(model, "CPU", options)


def run_each(
    compiled: ov.CompiledModel, images: Sequence[Image], read: Callable[[int, Any], T]
) -> Iterator[T]:
    """Compute images on all cores, and give what `read` makes of each, in their order.

    `read` gets the index of an image and its finished request, in one of several threads. With
    ov.AsyncInferQueue in their place the end of a model sometimes hung (OpenVINO 2026.4).
    """
    streams = stream_count()
    free: SimpleQueue[Any] = SimpleQueue()
    for _ in range(streams):
        free.put(compiled.create_infer_request())

    def run(index: int) -> T:
        request = free.get()
        try:
            request.infer([images[index][None]], share_inputs=True)
            return read(index, request)
        finally:
            free.put(request)

    with ThreadPoolExecutor(streams) as pool:
        yield from pool.map(run, range(len(images)))


def answer(
    compiled: ov.CompiledModel, images: Sequence[Image], done: Callable[[], object] = int
) -> Probabilities:
    """The model's answers to the images; `done` is called after each."""

    def read(_: int, request: Any) -> NDArray[np.float32]:
        return np.array(request.get_output_tensor(0).data[0])

    answers = []
    for row in run_each(compiled, images, read):
        answers.append(row)
        done()
    return np.stack(answers)


def measure(
    model: ov.Model, images: Sequence[Image], core: ov.Core, done: Callable[[], object]
) -> Measurement:
    """A model's answers to the images, and the time of one; `done` is called after each."""
    compiled = compile_for_one(model, images[0].shape, core)
    request, times = compiled.create_infer_request(), []
    for image in images[:TIMED_IMAGES]:  # one after the other, so that each is on one core
        begin = time.process_time()
        request.infer([image[None]], share_inputs=True)
        times.append(time.process_time() - begin)
    return Measurement(answer(compiled, images, done), 1000 * float(np.median(times)))
