"""TorchServe's description of a model, as its management port sends it."""

from typing import Any


def described(*workers: str, expected: int = 2, gpu_usage: str = "N/A") -> list[dict[str, Any]]:
    """One version of the model birds, whose workers have these states."""
    return [
        {
            "modelName": "birds",
            "modelVersion": "1.0",
            "minWorkers": expected,
            "workers": [
                {
                    "id": str(9000 + index),
                    "status": status,
                    "pid": 2**30 + index,  # of no process here
                    "gpu": gpu_usage != "N/A",
                    "gpuUsage": gpu_usage,
                }
                for index, status in enumerate(workers)
            ],
            "jobQueueStatus": {"remainingCapacity": 100, "pendingRequests": 0},
        }
    ]
