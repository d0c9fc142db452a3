"""Ray Serve: a replica a core, and its batching."""

from typing import Any

from ray import serve
from starlette.requests import Request

from benchmarks.peers.classifier import BATCH_SIZE, PORT, WORKERS, Classifier


@serve.deployment(num_replicas=WORKERS, max_ongoing_requests=2 * BATCH_SIZE)
class ImageClassifier:
    def __init__(self) -> None:
        self.classifier = Classifier()

    @serve.batch(max_batch_size=BATCH_SIZE, batch_wait_timeout_s=0.001)
    async def classify(self, jpegs: list[bytes]) -> list[Any]:
        return self.classifier.classify_batch(jpegs)

    async def __call__(self, request: Request) -> dict[str, Any]:
        return {"predictions": await self.classify(await request.body())}


app = ImageClassifier.bind()

if __name__ == "__main__":
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(app, blocking=True)
