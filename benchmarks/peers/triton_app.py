"""NVIDIA Triton through pytriton: an instance a core, and Triton's dynamic batching."""

import json

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

from benchmarks.peers.classifier import BATCH_SIZE, PORT, WORKERS, Classifier


class Instance:
    """A function for each instance, which pytriton calls in a thread of its own.

    One process, so one interpreter lock; decoding and models release it most of the time.
    """

    def __init__(self) -> None:
        self.classifier: Classifier | None = None

    @batch
    def __call__(self, image: np.ndarray) -> dict[str, np.ndarray]:
        if self.classifier is None:
            self.classifier = Classifier()
        answers = self.classifier.classify_batch([bytes(jpeg) for [jpeg] in image])
        texts = [[json.dumps({"predictions": answer}).encode()] for answer in answers]
        return {"answer": np.array(texts, dtype=np.object_)}


if __name__ == "__main__":
    config = TritonConfig(
        http_address="127.0.0.1",
        http_port=PORT,
        grpc_address="127.0.0.1",
        grpc_port=PORT + 1,
        metrics_port=PORT + 2,
    )
    with Triton(config=config) as triton:
        triton.bind(
            model_name="classifier",
            infer_func=[Instance() for _ in range(WORKERS)],
            inputs=[Tensor(name="image", dtype=bytes, shape=(1,))],
            outputs=[Tensor(name="answer", dtype=bytes, shape=(1,))],
            config=ModelConfig(max_batch_size=BATCH_SIZE, batcher=DynamicBatcher()),
        )
        triton.serve()
