"""The TorchServe handler: glue between TorchServe's rows and the modules that do the work.

TorchServe wants exactly one class in this module (ts/model_loader.py).
"""

import gc
import json
import logging
import platform
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from io import BytesIO
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from PIL import Image

from handler.answers import Answer, best_classes, encode, failure, several, success
from handler.base import BaseHandler
from handler.cache import Result, ResultCache
from handler.engines import load_engine
from handler.errors import MalformedRequest, ModelFailed, RequestError, SetupError
from handler.images import Picture, PixelBudget, read_picture
from handler.metrics import Metrics, torchserve_emit
from handler.model_card import ModelCard
from handler.payloads import ImageRequest, read_request
from handler.rows import Item, Row
from handler.settings import Settings

STAGES = ("preprocess", "inference", "postprocess", "total")
LIBRARIES = (
    "torchserve",
    "torch",
    "torchvision",
    "openvino",
    "simplejpeg",
    "pillow",
    "numpy",
    "safetensors",
    "orjson",
)


def log_line(level: int, event: str, **facts: Any) -> None:
    """One JSON object on one line of the worker's stdout, which TorchServe passes on.

    ASCII only: TorchServe's reader would break a line at U+2028.
    """
    line = {
        "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        "level": logging.getLevelName(level),
        "event": event,
    }
    # INFO whatever the level says, because TorchServe's own logger in the worker stands there.
    logging.getLogger("classifier").info(json.dumps(line | facts))


def milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)


class ImageClassifier(BaseHandler):
    """Answers image classification requests; each worker has one instance."""

    def initialize(self, context: Any) -> None:
        """Load settings, model and engine, and warm up. Called once, before the worker is READY.

        Raises RuntimeError where the worker cannot start: TorchServe reports no other kind.
        """
        started = perf_counter()
        self.context = context
        config = context.model_yaml_config or {}
        model_dir = Path(context.system_properties["model_dir"])
        try:
            self.settings = Settings.load(config.get("handler"))
            self.card = ModelCard.read(model_dir)
            if not self.card.weights.trained and not self.settings.allow_untrained:
                raise SetupError("the weights are untrained, and allow_untrained is false")
            self.engine = load_engine(
                self.card,
                model_dir,
                self.settings,
                context.system_properties.get("gpu_id"),
                workers=config.get("minWorkers", 1),
            )
            self.version = str(context.manifest["model"]["modelVersion"])
            size = self.settings.cache_bytes
            self.cache = ResultCache(size) if size else None
            self.metrics = Metrics(torchserve_emit(), context.model_name, self.version)
            self._warm_up(config.get("batchSize", 1))
        except Exception as exc:
            expected = isinstance(exc, SetupError) and exc.__cause__ is None
            log_line(
                logging.ERROR,
                "startup_failed",
                model=context.model_name,
                message=str(exc),
                cause=None if expected else traceback.format_exc(),
            )
            raise RuntimeError(str(exc)) from exc
        # What was loaded stays: a full collection would go through all of torch, in somebody's
        # request, and find nothing.
        gc.collect()
        gc.freeze()
        self.metrics.start()
        # TorchServe writes a line for each batch through the root logger itself; its errors stay,
        # and so does whatever comes through any other logger, the metrics above all.
        logging.getLogger().addFilter(lambda record: record.levelno > logging.INFO)
        self.initialized = True
        log_line(
            logging.INFO if self.card.weights.trained else logging.WARNING,
            "model_ready",
            **self._identity(),
            engine=self.engine.name,
            device=self.engine.device,
            threads=torch.get_num_threads(),
            startup_ms=milliseconds(perf_counter() - started),
        )

    def _warm_up(self, batch_size: int) -> None:
        """Classify a blank image, alone and as a full batch: the first client need not wait."""
        file = BytesIO()
        Image.new("RGB", (500, 375)).save(file, "JPEG")
        for _ in range(self.settings.warmup_batches):
            pixels = read_picture(file.getvalue(), self.card.transform, Settings()).pixels
            for images in sorted({1, min(batch_size, self.engine.max_forward)}):
                probabilities = self.engine.probabilities(torch.stack([pixels] * images))
                if not torch.isfinite(probabilities).all():
                    raise SetupError("the model gives no finite probabilities for a blank image")

    def handle(self, data: list[Mapping[str, Any]], context: Any) -> list[bytes]:
        """Answer a batch: one answer for each row, in order, whatever befalls its neighbours."""
        self.context = context
        if self._is_info(data):
            return [encode(self.describe_handle())]
        started = perf_counter()
        rows = self.inference(self.preprocess(data))
        answers = self.postprocess(rows)
        total = perf_counter() - started
        for row in rows:
            row.seconds["total"] = total
            self._account(row, batch=len(rows))
        return answers

    def _is_info(self, data: list[Mapping[str, Any]]) -> bool:
        """Whether TorchServe asks for `describe_handle`, and not a client with such a header.

        An empty row of a client comes from a form that TorchServe could not read, and has its type.
        """
        if len(data) != 1 or data[0]:
            return False
        headers = self._headers(0)
        return headers.get("describe") == "True" and "content-type" not in headers

    def preprocess(self, data: list[Mapping[str, Any]]) -> list[Row]:
        """TorchServe's rows to Rows with decoded images; what is refused carries its error."""
        rows = []
        pictures: dict[bytes, Picture] = {}  # of this batch: the same bytes are decoded once
        for index, fields in enumerate(data):
            started = perf_counter()
            request_id = self.context.get_request_id(index)
            row = self._read(request_id, fields, self._headers(index), pictures)
            row.seconds["preprocess"] = perf_counter() - started
            rows.append(row)
        return rows

    def _headers(self, index: int) -> dict[str, Any]:
        """A request's headers in lower case; TorchServe keeps the client's spelling."""
        headers = self.context.get_all_request_header(index)
        return {name.lower(): value for name, value in headers.items()}

    def _read(
        self,
        request_id: str,
        fields: Mapping[str, Any],
        headers: Mapping[str, Any],
        pictures: dict[bytes, Picture],
    ) -> Row:
        try:
            if headers.get("explain") == "True":
                raise MalformedRequest("explanations are not offered; use /predictions")
            request = read_request(fields, headers, len(self.card.labels), self.settings)
        except RequestError as error:
            return Row(request_id, error)
        except Exception:  # a bug of ours is one client's 500, not the whole batch's 503
            return Row(request_id, self._failure("the request could not be read", request_id))
        budget = PixelBudget(self.settings.max_image_pixels)
        items = []
        for image in request.images:
            try:
                items.append(self._open(image, budget, pictures))
            except RequestError as error:
                items.append(Item(error=error))
            except Exception:  # as above
                failed = self._failure("the image could not be processed", request_id)
                items.append(Item(error=failed))
        return Row(request_id, request, items)

    def _open(
        self, image: bytes | RequestError, budget: PixelBudget, pictures: dict[bytes, Picture]
    ) -> Item:
        """An image from the cache, from this batch, or decoded. Raises RequestError."""
        if isinstance(image, RequestError):
            raise image
        key = None
        if self.cache:
            key = self.cache.key(image)
            if result := self.cache.get(key):
                budget.spend(*result.size)
                return Item(size=result.size, probabilities=result.probabilities, cached=True)
        if picture := pictures.get(image):
            budget.spend(*picture.size)
        else:
            picture = read_picture(image, self.card.transform, self.settings, budget)
            pictures[image] = picture
        return Item(size=picture.size, picture=picture, key=key)

    def _failure(self, message: str, *request_ids: str) -> ModelFailed:
        """Log the exception being handled under the requests' ids; the client gets the message."""
        cause = traceback.format_exc() if sys.exc_info()[0] else message
        log_line(logging.ERROR, "failure", **self._identity(), requests=request_ids, cause=cause)
        return ModelFailed(message)

    def inference(self, rows: list[Row]) -> list[Row]:
        """Give every picture of every row its probabilities, in passes that the rows share."""
        started = perf_counter()
        holders: dict[Picture, list[tuple[Item, str]]] = {}  # one picture may be several items'
        for row in rows:
            for item in row.items:
                if item.picture:
                    holders.setdefault(item.picture, []).append((item, row.request_id))
        waiting = list(holders.items())
        for start in range(0, len(waiting), self.engine.max_forward):
            self._classify(*zip(*waiting[start : start + self.engine.max_forward], strict=True))
        for row in rows:
            if any(item.picture for item in row.items):
                row.seconds["inference"] = perf_counter() - started
        return rows

    def _classify(
        self, pictures: Sequence[Picture], holders: Sequence[list[tuple[Item, str]]]
    ) -> None:
        """One forward pass; `holders` has each picture's items with their requests' ids."""
        images = torch.stack([picture.pixels for picture in pictures])
        try:
            # As a list, so that a wrong number of rows is an error before any is taken.
            classified = list(zip(holders, self.engine.probabilities(images), strict=True))
        except Exception:  # the images all have one shape: what fails here is not one of them
            request_ids = dict.fromkeys(request_id for held in holders for _, request_id in held)
            error = self._failure("the model failed", *request_ids)
            for item, _ in chain(*holders):
                item.error = error
            return
        for held, probabilities in classified:
            finite = bool(torch.isfinite(probabilities).all())
            for item, request_id in held:
                if not finite:
                    item.error = self._failure("the model gave no finite probabilities", request_id)
                    continue
                item.probabilities = probabilities
                if self.cache and item.key:
                    self.cache.put(item.key, Result(item.size, probabilities))

    def postprocess(self, rows: list[Row]) -> list[bytes]:
        """JSON bytes for each row; sets its status and content type in the context."""
        answers = []
        for index, row in enumerate(rows):
            started = perf_counter()
            row.status, answer = self._answer(row)
            # The phrase stays empty: TorchServe loses step with the worker over non-ASCII ones.
            self.context.set_response_status(row.status, "", index)
            self.context.set_response_content_type(index, "application/json")
            # Which version it was, and that it was us: TorchServe's own errors do not have it.
            self.context.set_response_header(index, "X-Model-Version", self.version)
            answers.append(encode(answer))
            row.seconds["postprocess"] = perf_counter() - started
        return answers

    def _answer(self, row: Row) -> tuple[int, Answer]:
        """HTTP status and answer of one row."""
        if isinstance(row.request, RequestError):
            return row.request.status, failure(row.request)
        results = [self._result(item, row, row.request) for item in row.items]
        if row.request.several:
            return several(results)
        return results[0].get("code", 200), results[0]

    def _result(self, item: Item, row: Row, request: ImageRequest) -> Answer:
        """The answer for one image of a row."""
        if item.error or item.probabilities is None:
            return failure(item.error or ModelFailed("the image was not classified"))
        item.predictions = best_classes(item.probabilities, request.top_k, self.card.labels)
        metadata = {
            "filename": request.filename,
            "inference_time": round(row.seconds.get("inference", 0), 6),
            **self._identity(),
            "device": self.engine.device,
            "engine": self.engine.name,
            "image_size": item.size,
            "cached": item.cached,
            "request_id": row.request_id,
        }
        return success(item.predictions, metadata)

    def _account(self, row: Row, batch: int) -> None:
        """Count a finished row in the metrics and write its line in the log."""
        errors = [item.error for item in row.items if item.error]
        if isinstance(row.request, RequestError):
            errors = [row.request]
        best = next((item.predictions[0] for item in row.items if item.predictions), {})
        self.metrics.count_request(row.status)
        for item in row.items:
            if item.predictions:
                self.metrics.count_image("success")
        for error in errors:
            self.metrics.count_image(type(error).__name__)
        for stage, seconds in row.seconds.items():
            self.metrics.observe(stage, seconds)
        if self.settings.log_requests:
            log_line(
                logging.ERROR if row.status >= 500 else logging.INFO,
                "request",
                request_id=row.request_id,
                **self._identity(),
                status=row.status,
                images=len(row.items),
                cached=sum(item.cached for item in row.items),
                batch=batch,
                **{f"{stage}_ms": milliseconds(row.seconds.get(stage, 0)) for stage in STAGES},
                top_class=best.get("class"),
                confidence=best.get("confidence"),
                error=type(errors[0]).__name__ if errors else None,
            )

    def _identity(self) -> dict[str, str]:
        """What every answer and log line says about the model."""
        return {
            "model": self.context.model_name,
            "version": self.version,
            "weights": self.card.weights.name,
        }

    def describe_handle(self) -> dict[str, Any]:
        """`info`: the answer to GET :8081/models/{model}?customized=true."""
        card, size = self.card, self.card.transform.crop_size
        return {
            "model": self.context.model_name,
            "version": self.version,
            "architecture": card.architecture,
            "parameters": card.parameters,
            "classes": len(card.labels),
            "input_size": [3, size, size],
            "recipe": card.recipe,
            "transforms": asdict(card.transform),
            "weights": asdict(card.weights),
            "engine": self.engine.name,
            "precision": self.engine.precision,
            "int8": card.int8,
            "device": self.engine.device,
            "threads": torch.get_num_threads(),
            "libraries": {name: version(name) for name in LIBRARIES}
            | {"python": platform.python_version()},
            "packaged_with": card.packaged_with,
            "settings": asdict(self.settings),
        }
