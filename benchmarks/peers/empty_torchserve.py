"""TorchServe as we start it, around a handler that does nothing: the frontend's share of the cost.

Our config.properties, log4j2.xml and Java, and the model's own batch size, delay and workers.
"""

import os
import signal
import sys
from pathlib import Path
from threading import Event
from unittest.mock import patch

import yaml
from model_archiver.model_packaging import generate_model_archive

from benchmarks.peers.classifier import PORT
from service.ports import check_ports
from service.torchserve.config import ServerConfig
from service.torchserve.java import find_java
from service.torchserve.server import Served, TorchServe


def make_archive(folder: Path, model_config: Path) -> Path:
    """The archive, with the model configuration of ours and without its handler's settings."""
    config = yaml.safe_load(model_config.read_text("utf-8"))
    for key in ("handler", "deviceType"):  # it has no use for a GPU
        config.pop(key, None)
    (folder / "model-config.yaml").write_text(yaml.safe_dump(config))
    command = [
        *("torch-model-archiver", "--model-name", "classifier", "--version", "1.0"),
        *("--handler", Path(__file__).with_name("empty_handler.py")),
        *("--config-file", folder / "model-config.yaml", "--export-path", folder),
    ]
    with patch.object(sys, "argv", [str(word) for word in command]):
        generate_model_archive()
    return folder / "classifier.mar"


def main() -> int:
    stop = Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    folder = Path.cwd()
    archive = make_archive(folder, Path(os.environ["BENCHMARK_MODEL_DIR"]) / "model-config.yaml")
    config = ServerConfig.load("127.0.0.1", PORT, PORT + 1, PORT + 2)
    check_ports(config.addresses.by_purpose())
    environ = config.environment() | {"TS_NUMBER_OF_GPU": "0"}
    server = TorchServe(find_java(), config, [Served(archive)], environ)
    try:
        server.start()
        while not stop.wait(0.2) and server.exit_status() is None:
            pass
    finally:
        server.stop()
    return server.exit_status() or 0


if __name__ == "__main__":
    sys.exit(main())
