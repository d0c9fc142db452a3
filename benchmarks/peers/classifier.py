"""The job itself, so that peers differ in nothing but the serving.

"eager" is what a tutorial does: PIL, the transforms of the weights, torch. "ours" is the engine and
the decoding of the archive, without its request handling. The only peer module that knows the
handler's interfaces.
"""

import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Any

import torch

TOP_K = 5
BATCH_SIZE = int(os.environ.get("BENCHMARK_BATCH_SIZE", "8"))
WORKERS = int(os.environ.get("BENCHMARK_WORKERS", "2"))
PORT = int(os.environ.get("BENCHMARK_PORT", "8000"))


class Eager:
    """JPEG bytes -> float32 probabilities, one core a worker: more threads only get in the way."""

    def __init__(self, model_dir: Path) -> None:
        from safetensors.torch import load_file
        from torchvision.models import get_model, get_weight

        from handler.model_card import WEIGHTS_FILE, ModelCard

        torch.set_num_threads(1)
        card = ModelCard.read(model_dir)
        self.labels = card.labels
        self._transforms = get_weight(card.recipe).transforms()
        self._network = get_model(card.architecture, num_classes=len(card.labels)).eval()
        self._network.load_state_dict(load_file(model_dir / WEIGHTS_FILE))

    @torch.inference_mode()
    def probabilities(self, jpegs: Sequence[bytes]) -> torch.Tensor:
        from PIL import Image

        images = [Image.open(BytesIO(jpeg)).convert("RGB") for jpeg in jpegs]
        batch = torch.stack([self._transforms(image) for image in images])
        return self._network(batch).softmax(dim=1)


class Ours:
    """The same with the archive's own code; BENCHMARK_MODEL_DIR is on PYTHONPATH for it."""

    def __init__(self, model_dir: Path) -> None:
        import yaml

        from handler.engines import load_engine
        from handler.model_card import ModelCard
        from handler.settings import Settings

        card = ModelCard.read(model_dir)
        config = yaml.safe_load((model_dir / "model-config.yaml").read_text("utf-8"))
        self.labels = card.labels
        self._settings = Settings.load(config["handler"])
        self._transform = card.transform
        self._engine = load_engine(card, model_dir, self._settings, gpu_id=None, workers=WORKERS)
        # An engine is for one thread, as in a TorchServe worker; FastAPI calls from many.
        self._one_at_a_time = Lock()

    def probabilities(self, jpegs: Sequence[bytes]) -> torch.Tensor:
        from handler.images import read_picture

        pictures = [read_picture(jpeg, self._transform, self._settings) for jpeg in jpegs]
        images = torch.stack([picture.pixels for picture in pictures])
        with self._one_at_a_time:
            return self._engine.probabilities(images)


class Classifier:
    """What every peer calls; made once in each worker."""

    def __init__(self, engine: str | None = None) -> None:
        engine = engine or os.environ["BENCHMARK_ENGINE"]
        model_dir = Path(os.environ["BENCHMARK_MODEL_DIR"])
        self._engine = Eager(model_dir) if engine == "eager" else Ours(model_dir)

    def classify(self, jpeg: bytes) -> list[dict[str, Any]]:
        return self.classify_batch([jpeg])[0]

    def classify_batch(self, jpegs: Sequence[bytes]) -> list[list[dict[str, Any]]]:
        from handler.answers import best_classes

        labels = self._engine.labels
        rows = self._engine.probabilities(jpegs).numpy()
        return [best_classes(row, TOP_K, labels) for row in rows]
