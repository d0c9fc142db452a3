"""An archive as its worker would serve it: the handler in this process, without a server."""

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from ts.context import Context, RequestProcessor

from handler.errors import InvalidModel, SetupError
from handler.image_classifier import ImageClassifier
from service.archive.mar import CONFIG_FILE, parse_config, read_card, read_target, unpack
from service.bulk.sources import Image
from service.client import error
from service.evaluation.targets import BEST, Answer, drawn_image, labels_of

AT_ONCE = 16  # images in one batch of the handler
# The configuration is the archive's, and all cores are this worker's. Its log would be ours.
ALONE = {"minWorkers": 1, "maxWorkers": 1}
QUIET = {"log_requests": False, "log_level": "error", "cache_bytes": 0}


class Archive:
    """An archive that is laid out in a folder and loaded; no code that is in it is run."""

    def __init__(self, archive: Path, folder: Path, options: Mapping[str, str]) -> None:
        """Raises SetupError if it is damaged, or its model does not run here."""
        card = read_card(archive)
        if card is None:
            raise InvalidModel(f"{archive} is missing, damaged or no model archive")
        model, version = read_target(archive)
        unpack(archive, None, folder, card)
        config = parse_config((folder / CONFIG_FILE).read_bytes()) | ALONE
        config["handler"] = (config.get("handler") or {}) | QUIET
        manifest = {"model": {"modelName": model, "modelVersion": version}}
        self.name = str(archive)
        self._options = dict(options)
        self._context = Context(
            model, str(folder), manifest, AT_ONCE, None, "", model_yaml_config=config
        )
        self._worker = ImageClassifier()
        self._worker.may_end = False
        try:
            self._worker.initialize(self._context)
        except RuntimeError as exc:  # the only kind that the handler raises
            raise InvalidModel(f"{archive}: {exc}") from exc
        [answer] = self._ask([drawn_image()], len(card.labels))
        self.labels = labels_of(self.name, answer)

    def answers(self, images: Iterable[Image]) -> Iterator[tuple[Image, Answer]]:
        """Each image with its answer or error. Raises SetupError if the GPU is lost."""
        top_k = min(BEST, len(self.labels))
        coming = iter(images)
        while group := list(islice(coming, AT_ONCE)):
            readable = [image for image in group if not image.problem]
            yield from zip(readable, self._ask([i.body for i in readable], top_k), strict=True)
            for image in group:
                if image.problem:
                    yield image, error(0, *image.problem)

    def _ask(self, bodies: list[bytes], top_k: int) -> list[Answer]:
        """A batch of requests, one for each image, in the form in which clients send files."""
        rows: list[Mapping[str, Any]] = [
            {"file": body, "top_k": str(top_k)} | self._options for body in bodies
        ]
        self._context.request_ids = {index: str(index) for index in range(len(rows))}
        self._context.request_processor = [RequestProcessor({}) for _ in rows]
        bodies = self._worker.handle(rows, self._context)
        if self._worker.failures.gpu_lost:
            raise SetupError(f"{self.name}: the GPU failed")
        return [json.loads(body) for body in bodies]
