"""LitServe: a worker a core, as its documentation has it for CPUs, and its batching.

It takes files in forms only, so the JPEG is the part `request` of a multipart body.
"""

from typing import Any

import litserve
from fastapi import UploadFile

from benchmarks.peers.classifier import BATCH_SIZE, PORT, WORKERS, Classifier


class ClassifierAPI(litserve.LitAPI):
    def setup(self, device: str) -> None:  # noqa: ARG002 the framework's signature
        self.classifier = Classifier()

    def decode_request(self, request: UploadFile) -> bytes:
        return request.file.read()

    def predict(self, jpegs: list[bytes]) -> list[Any]:
        return self.classifier.classify_batch(jpegs)

    def encode_response(self, output: Any) -> dict[str, Any]:
        return {"predictions": output}


if __name__ == "__main__":
    api = ClassifierAPI(max_batch_size=BATCH_SIZE, batch_timeout=0.001)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=WORKERS)
    server.run(host="127.0.0.1", port=PORT, generate_client_file=False)
