"""FastAPI behind uvicorn: `uvicorn --workers 2 fastapi_app:app`.

The body is read in the event loop; the model runs in the pool of threads, so that the loop goes on.
"""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool

from benchmarks.peers.classifier import Classifier

app = FastAPI()
classifier = Classifier()


@app.post("/predict")
async def predict(request: Request) -> dict[str, Any]:
    jpeg = await request.body()
    return {"predictions": await run_in_threadpool(classifier.classify, jpeg)}
