"""Passes of an OpenVINO model over calibration images: single images, one on each core."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from handler.machine import available_cores

MAXIMUM_STREAMS = 8  # each holds the activations of an image
TIMED_IMAGES = 20

Image = NDArray[np.uint8]  # RGB [3, H, W]
Probabilities = NDArray[np.float32]  # [N, C]


@dataclass(frozen=True)
class Measurement:
    """A model's answers to images, and the processor time of one: others may use the machine."""

    probabilities: Probabilities
    milliseconds: float


def compile_for_one(model: ov.Model, shape: Sequence[int], core: ov.Core) -> ov.CompiledModel:
    """The model, without bf16, for single images [3, H, W], each of which takes one core."""
    model = model.clone()
    model.reshape([1, *shape])
    streams = min(available_cores(), MAXIMUM_STREAMS)
    options = {
        "INFERENCE_NUM_THREADS": streams,
        "NUM_STREAMS": streams,
        "ENABLE_CPU_PINNING": False,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    return core.compile_model(model, "CPU", options)


def run_each(
    compiled: ov.CompiledModel, images: Sequence[Image], take: Callable[[int, Any], object]
) -> None:
    """Compute images on all cores; `take` gets the index of each and its finished request.

    It is called from several threads, in the order in which the images are done.
    """
    queue = ov.AsyncInferQueue(compiled)
    queue.set_callback(lambda request, index: take(index, request))
    for index, image in enumerate(images):
        queue.start_async([image[None]], index, share_inputs=True)
    queue.wait_all()


def answer(
    compiled: ov.CompiledModel, images: Sequence[Image], done: Callable[[], object] = int
) -> Probabilities:
    """The model's answers to the images; `done` is called after each."""
    answers = np.empty((len(images), compiled.output(0).shape[1]), np.float32)

    def take(index: int, request: Any) -> None:
        answers[index] = request.get_output_tensor(0).data[0]
        done()

    run_each(compiled, images, take)
    return answers


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
