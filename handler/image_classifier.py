"""The TorchServe handler: glue between TorchServe's rows and the modules that do the work.

TorchServe wants exactly one class in this module (ts/model_loader.py).
"""

import json
import logging
import platform
import sys
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from PIL import Image
from ts.torch_handler.base_handler import BaseHandler

from handler.answers import Answer, best_classes, encode, failure, several, success
from handler.engines import load_engine
from handler.errors import MalformedRequest, ModelFailed, RequestError, SetupError
from handler.images import InputTransform, PixelBudget, read_picture
from handler.metrics import Metrics, torchserve_emit
from handler.model_card import ModelCard
from handler.networks import get_recipe
from handler.payloads import ImageRequest, read_request
from handler.rows import Item, Row
from handler.settings import Settings

MAX_FORWARD = 32  # images in one forward pass: bounds the memory of requests with many images
STAGES = ("preprocess", "inference", "postprocess", "total")
LIBRARIES = ("torchserve", "torch", "torchvision", "pillow", "safetensors", "orjson")


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
            self.transform = InputTransform.from_recipe(
                get_recipe(self.card.architecture, self.card.recipe)
            )
            self.engine = load_engine(
                self.card,
                model_dir,
                self.settings,
                context.system_properties.get("gpu_id"),
                workers=config.get("minWorkers", 1),
            )
            self.version = str(context.manifest["model"]["modelVersion"])
            self.metrics = Metrics(torchserve_emit(), context.model_name, self.version)
            self._warm_up(config.get("batchSize", 1))
        except Exception as exc:
            expected = isinstance(exc, SetupError)
            log_line(
                logging.ERROR,
                "startup_failed",
                model=context.model_name,
                message=str(exc),
                cause=None if expected else traceback.format_exc(),
            )
            raise RuntimeError(str(exc)) from exc
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
            pixels = read_picture(file.getvalue(), self.transform, Settings()).pixels
            for images in sorted({1, min(batch_size, MAX_FORWARD)}):
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
        for index, fields in enumerate(data):
            started = perf_counter()
            row = self._read(self.context.get_request_id(index), fields, self._headers(index))
            row.seconds["preprocess"] = perf_counter() - started
            rows.append(row)
        return rows

    def _headers(self, index: int) -> dict[str, Any]:
        """A request's headers in lower case; TorchServe keeps the client's spelling."""
        headers = self.context.get_all_request_header(index)
        return {name.lower(): value for name, value in headers.items()}

    def _read(self, request_id: str, fields: Mapping[str, Any], headers: Mapping[str, Any]) -> Row:
        try:
            if headers.get("explain") == "True":
                raise MalformedRequest("explanations are not offered; use /predictions")
            request = read_request(fields, headers, len(self.card.labels), self.settings)
        except RequestError as error:
            return Row(request_id, error)
        except Exception:  # a bug of ours is one client's 500, not the whole batch's 503
            return Row(request_id, self._failure("the request could not be read", request_id))
        budget = PixelBudget(self.settings.max_image_pixels)
        items = [self._decode(image, budget, request_id) for image in request.images]
        return Row(request_id, request, items)

    def _decode(self, image: bytes | RequestError, budget: PixelBudget, request_id: str) -> Item:
        if isinstance(image, RequestError):
            return Item(error=image)
        try:
            return Item(picture=read_picture(image, self.transform, self.settings, budget))
        except RequestError as error:
            return Item(error=error)
        except Exception:  # as in _read
            return Item(error=self._failure("the image could not be processed", request_id))

    def _failure(self, message: str, *request_ids: str) -> ModelFailed:
        """Log the exception being handled under the requests' ids; the client gets the message."""
        cause = traceback.format_exc() if sys.exc_info()[0] else message
        log_line(logging.ERROR, "failure", **self._identity(), requests=request_ids, cause=cause)
        return ModelFailed(message)

    def inference(self, rows: list[Row]) -> list[Row]:
        """Give every picture of every row its probabilities, in passes that the rows share."""
        started = perf_counter()
        ready = [(item, row.request_id) for row in rows for item in row.items if item.picture]
        for start in range(0, len(ready), MAX_FORWARD):
            part, request_ids = zip(*ready[start : start + MAX_FORWARD], strict=True)
            images = torch.stack([item.picture.pixels for item in part])
            try:
                # As a list, so that a wrong number of rows is an error before any is taken.
                classified = list(
                    zip(part, request_ids, self.engine.probabilities(images), strict=True)
                )
            except Exception:  # the images all have one shape: what fails here is not one of them
                error = self._failure("the model failed", *dict.fromkeys(request_ids))
                for item in part:
                    item.error = error
            else:
                for item, request_id, probabilities in classified:
                    if torch.isfinite(probabilities).all():
                        item.probabilities = probabilities
                    else:
                        item.error = self._failure(
                            "the model gave no finite probabilities", request_id
                        )
        for row in rows:
            if any(item.picture for item in row.items):
                row.seconds["inference"] = perf_counter() - started
        return rows

    def postprocess(self, rows: list[Row]) -> list[bytes]:
        """JSON bytes for each row; sets its status and content type in the context."""
        answers = []
        for index, row in enumerate(rows):
            started = perf_counter()
            row.status, answer = self._answer(row)
            # The phrase stays empty: TorchServe loses step with the worker over non-ASCII ones.
            self.context.set_response_status(row.status, "", index)
            self.context.set_response_content_type(index, "application/json")
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
        if item.error or item.picture is None or item.probabilities is None:
            return failure(item.error or ModelFailed("the image was not classified"))
        item.predictions = best_classes(item.probabilities, request.top_k, self.card.labels)
        metadata = {
            "filename": request.filename,
            "inference_time": round(row.seconds["inference"], 6),
            **self._identity(),
            "device": self.engine.device,
            "engine": self.engine.name,
            "image_size": item.picture.size,
            "cached": False,
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
        card, transform = self.card, self.transform
        return {
            "model": self.context.model_name,
            "version": self.version,
            "architecture": card.architecture,
            "parameters": card.parameters,
            "classes": len(card.labels),
            "input_size": [3, *transform.crop_size * 2],
            "recipe": card.recipe,
            "transforms": {
                "resize_size": transform.resize_size,
                "crop_size": transform.crop_size,
                "interpolation": transform.interpolation.value,
                "mean": transform.mean,
                "std": transform.std,
            },
            "weights": asdict(card.weights),
            "engine": self.engine.name,
            "precision": self.engine.precision,
            "device": self.engine.device,
            "threads": torch.get_num_threads(),
            "libraries": {name: version(name) for name in LIBRARIES}
            | {"python": platform.python_version()},
            "packaged_with": card.packaged_with,
            "settings": asdict(self.settings),
        }
