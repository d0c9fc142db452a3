"""BentoML: `bentoml serve bentoml_app:ImageClassifier`, a worker a core.

Without adaptive batching, which wants lists of images from the client or a second service.
"""

from pathlib import Path
from typing import Annotated, Any

import bentoml
from bentoml.validators import ContentType

from benchmarks.peers.classifier import WORKERS, Classifier


@bentoml.service(workers=WORKERS, traffic={"timeout": 60})
class ImageClassifier:
    def __init__(self) -> None:
        self.classifier = Classifier()

    @bentoml.api
    def predict(self, image: Annotated[Path, ContentType("image/jpeg")], /) -> dict[str, Any]:
        return {"predictions": self.classifier.classify(image.read_bytes())}
