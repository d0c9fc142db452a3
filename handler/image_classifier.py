"""The TorchServe handler: glue between TorchServe's rows and the modules that do the work.

TorchServe wants exactly one class in this module (ts/model_loader.py).
"""

import gc
import logging
import os
import platform
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from io import BytesIO
from itertools import chain
from pathlib import Path
from threading import Thread, Timer
from time import perf_counter, time
from typing import Any

import psutil
import torch
from PIL import Image
from torch import Tensor

from handler import metrics
from handler.answers import Answer, best_classes, encode, failure, several, success
from handler.base import BaseHandler
from handler.cache import Result, ResultCache
from handler.decoders import Decoding, choose_decoder
from handler.engines import load_engine
from handler.errors import MalformedRequest, ModelFailed, OutOfResources, RequestError, SetupError
from handler.gpus import open_gauges
from handler.headers import is_probe, read_queue_seconds, read_traceparent
from handler.images import PixelBudget, open_image, read_picture
from handler.logs import log_line, set_level
from handler.metrics import Metrics, claim_slot, torchserve_emit
from handler.model_card import ModelCard
from handler.payloads import ImageRequest, read_request
from handler.pipeline import Timed, classify
from handler.pulse import Pulse, count_hung
from handler.rows import Item, Row
from handler.settings import Settings

LOGGED_STAGES = ("preprocess", "inference", "postprocess", "total")
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
    "multipart",
)
LEAVE_SECONDS = 0.5  # for the last answers on their way out
GPU_LOST = "the GPU is lost, and a new worker about to start; try again later"


def milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)


class ImageClassifier(BaseHandler):
    """Answers image classification requests; each worker has one instance."""

    gpu_lost = False  # this process will end in a moment

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
            set_level(self.settings.log_level)
            self.version = str(context.manifest["model"]["modelVersion"])
            self.metrics = Metrics(
                torchserve_emit(), context.model_name, self.version, claim_slot(model_dir)
            )
            self.metrics.add(metrics.STARTS, 1)
            self.metrics.add(metrics.HUNG, count_hung(model_dir))
            self.metrics.flush()  # before what may fail
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
            self.decoder, reason = choose_decoder(
                self.card.transform, self.settings, self.engine.device, torch.get_num_threads()
            )
            if reason:
                log_line(logging.WARNING, "decoder_chosen", decoder=self.decoder.name, **reason)
            size = self.settings.cache_bytes
            self.cache = ResultCache(size) if size else None
            warm_up = perf_counter()
            self.pulse = Pulse(model_dir, self._warm_up(config.get("batchSize", 1)))
            self.metrics.set(metrics.WARM_UP, perf_counter() - warm_up)
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
        self._describe_to_metrics()
        self.metrics.readers.append(open_gauges(self.engine.device))
        self.metrics.start()
        self.pulse.start()
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

    def _warm_up(self, batch_size: int) -> float | None:
        """Classify a blank image, alone and as a full batch: the first client need not wait.

        Gives the seconds that the largest forward pass would take; None without a warm-up.
        """
        file = BytesIO()
        Image.new("RGB", (500, 375)).save(file, "JPEG")
        seconds = None
        for _ in range(self.settings.warmup_batches):
            pixels = read_picture(file.getvalue(), self.card.transform, Settings()).pixels
            for images in sorted({1, min(batch_size, self.engine.max_forward)}):
                started = perf_counter()
                probabilities = self.engine.probabilities(torch.stack([pixels] * images))
                seconds = (perf_counter() - started) / images * self.engine.max_forward
                if not torch.isfinite(probabilities).all():
                    raise SetupError("the model gives no finite probabilities for a blank image")
        return seconds

    def handle(self, data: list[Mapping[str, Any]], context: Any) -> list[bytes]:
        """Answer a batch: one answer for each row, in order, whatever befalls its neighbours."""
        self.context = context
        if self._is_info(data):
            return [encode(self.describe_handle())]
        started, arrival = perf_counter(), time()
        with self.pulse.batch():
            rows = self.inference(self.preprocess(data))
            answers = self.postprocess(rows)
        total = perf_counter() - started
        self.metrics.add(metrics.BUSY, total)
        self.metrics.observe(metrics.BATCH, len(rows))
        for index, row in enumerate(rows):
            row.seconds["total"] = total
            self._account(row, self._headers(index), arrival, batch=len(rows))
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
        """TorchServe's rows to Rows with images whose decoding has begun, or with errors."""
        rows = []
        decodings: dict[bytes, Decoding] = {}  # of this batch: the same bytes are decoded once
        for index, fields in enumerate(data):
            started = perf_counter()
            request_id = self.context.get_request_id(index)
            row = self._read(request_id, fields, self._headers(index), decodings)
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
        decodings: dict[bytes, Decoding],
    ) -> Row:
        if self.gpu_lost:
            return Row(request_id, OutOfResources(GPU_LOST))
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
                cache = None if is_probe(headers) else self.cache
                items.append(self._open(image, budget, decodings, cache))
            except RequestError as error:
                items.append(Item(error=error))
            except Exception:  # as above
                failed = self._failure("the image could not be processed", request_id)
                items.append(Item(error=failed))
            self.pulse.step()
        return Row(request_id, request, items)

    def _open(
        self,
        image: bytes | RequestError,
        budget: PixelBudget,
        decodings: dict[bytes, Decoding],
        cache: ResultCache | None,
    ) -> Item:
        """An image from the cache, from this batch, or one to decode. Raises RequestError."""
        if isinstance(image, RequestError):
            raise image
        key = None
        if cache:
            key = cache.key(image)
            if result := cache.get(key):
                budget.spend(*result.size)
                return Item(size=result.size, probabilities=result.probabilities, cached=True)
        if decoding := decodings.get(image):
            budget.spend(*decoding.size)
        else:
            decoding = self.decoder.start(open_image(image, self.settings, budget))
            decodings[image] = decoding
        return Item(decoding=decoding, key=key)

    def _failure(
        self, message: str, *request_ids: str, exc: Exception | None = None, event: str = "failure"
    ) -> ModelFailed:
        """Log an exception, or the one being handled, under the requests' ids.

        The client gets the message.
        """
        cause = message
        if found := exc or sys.exc_info()[1]:
            cause = "".join(traceback.format_exception(found))
        log_line(logging.ERROR, event, **self._identity(), requests=request_ids, cause=cause)
        return ModelFailed(message)

    def inference(self, rows: list[Row]) -> list[Row]:
        """Give every image of every row its probabilities, in passes that the rows share."""
        started = perf_counter()
        holders: dict[Decoding, list[tuple[Item, str]]] = {}  # one image may be several items'
        for row in rows:
            for item in row.items:
                if item.decoding:
                    holders.setdefault(item.decoding, []).append((item, row.request_id))
        decoded = Timed(map(self._note, self.decoder.finish(list(holders))))
        for decodings, outcome in classify(decoded, self.engine):
            self.pulse.step()
            held = [holders[decoding] for decoding in decodings]
            if isinstance(outcome, Exception):
                self._fail(held, outcome)
            else:
                self._keep(held, outcome)
        for decoding, items in holders.items():
            if decoding.error:
                self._refuse(items, decoding.error)
        seconds = perf_counter() - started
        for row in rows:
            if any(item.decoding and item.decoding.picture for item in row.items):
                # What was waited for decoding belongs to the stage before.
                row.seconds["preprocess"] += decoded.seconds
                row.seconds["inference"] = seconds - decoded.seconds
        return rows

    def _note(self, decoding: Decoding) -> Decoding:
        """An image is decoded, on its way to the forward passes."""
        self.pulse.step()
        return decoding

    def _keep(self, held: Sequence[list[tuple[Item, str]]], probabilities: Tensor) -> None:
        """Give the items of each image of a forward pass their row of the probabilities."""
        for items, row in zip(held, probabilities, strict=True):
            finite = bool(torch.isfinite(row).all())
            for item, request_id in items:
                if not finite:
                    item.error = self._failure("the model gave no finite probabilities", request_id)
                    continue
                item.probabilities = row
                if item.decoding and item.decoding.picture:
                    item.size = item.decoding.picture.size
                if self.cache and item.key:
                    self.cache.put(item.key, Result(item.size, row))

    def _refuse(self, items: Sequence[tuple[Item, str]], error: Exception) -> None:
        """Give the items of an image that was not decoded their error."""
        for item, request_id in items:
            if isinstance(error, RequestError):
                item.error = error
            else:  # a bug of ours
                message = "the image could not be processed"
                item.error = self._failure(message, request_id, exc=error)

    def _fail(self, held: Sequence[list[tuple[Item, str]]], exc: Exception) -> None:
        """Give the items of a forward pass that failed their error.

        The images all have one shape: what fails is not one of them.
        """
        request_ids = dict.fromkeys(request_id for items in held for _, request_id in items)
        error: RequestError
        if isinstance(exc, torch.OutOfMemoryError):
            self._failure("out of memory", *request_ids, exc=exc)
            exc.__traceback__ = None  # its frames hold tensors
            with suppress(RuntimeError):
                torch.cuda.empty_cache()
            error = OutOfResources("the GPU has no memory for the image now; try again later")
        elif self.gpu_lost or self.engine.is_lost():
            self._leave(exc, *request_ids)
            error = OutOfResources(GPU_LOST)
        else:
            error = self._failure("the model failed", *request_ids, exc=exc)
        for item, _ in chain(*held):
            item.error = error

    def _leave(self, exc: Exception, *request_ids: str) -> None:
        """End the process when its answers are out: nothing but a new one gets the GPU back."""
        if self.gpu_lost:
            return
        self.gpu_lost = True
        self._failure("the GPU is lost", *request_ids, exc=exc, event="gpu_lost")

        def end() -> None:
            flush = Thread(target=self.metrics.flush, daemon=True)
            flush.start()
            flush.join(LEAVE_SECONDS)  # NVML may hang with the GPU
            os._exit(1)

        timer = Timer(LEAVE_SECONDS, end)
        timer.daemon = True
        timer.start()

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
        results = [
            self._result(item, filename, row, row.request)
            for item, filename in zip(row.items, row.request.filenames, strict=True)
        ]
        if row.request.several:
            return several(results)
        return results[0].get("code", 200), results[0]

    def _result(self, item: Item, filename: str | None, row: Row, request: ImageRequest) -> Answer:
        """The answer for one image of a row."""
        if item.error or item.probabilities is None:
            return failure(item.error or ModelFailed("the image was not classified"))
        item.predictions = best_classes(item.probabilities, request.top_k, self.card.labels)
        metadata = {
            "filename": filename,
            "inference_time": round(row.seconds.get("inference", 0), 6),
            **self._identity(),
            "device": self.engine.device,
            "engine": self.engine.name,
            "image_size": item.size,
            "cached": item.cached,
            "request_id": row.request_id,
        }
        return success(item.predictions, metadata)

    def _account(self, row: Row, headers: Mapping[str, Any], arrival: float, batch: int) -> None:
        """Count a finished row in the metrics and write its line in the log."""
        if is_probe(headers):
            self.metrics.add(metrics.PROBES, 1, str(row.status))
            return
        queue = read_queue_seconds(headers, arrival)
        errors = [item.error for item in row.items if item.error]
        if isinstance(row.request, RequestError):
            errors = [row.request]
        self._count(row, errors, queue)
        best = next((item.predictions[0] for item in row.items if item.predictions), {})
        if self.settings.log_requests:
            log_line(
                logging.ERROR if row.status >= 500 else logging.INFO,
                "request",
                request_id=row.request_id,
                traceparent=read_traceparent(headers),
                **self._identity(),
                status=row.status,
                images=len(row.items),
                cached=sum(item.cached for item in row.items),
                batch=batch,
                queue_ms=None if queue is None else milliseconds(queue),
                **{
                    f"{stage}_ms": milliseconds(row.seconds.get(stage, 0))
                    for stage in LOGGED_STAGES
                },
                top_class=best.get("class"),
                confidence=best.get("confidence"),
                error=type(errors[0]).__name__ if errors else None,
            )

    def _count(self, row: Row, errors: list[RequestError], queue: float | None) -> None:
        add, observe = self.metrics.add, self.metrics.observe
        add(metrics.REQUESTS, 1, str(row.status))
        for stage, seconds in row.seconds.items():
            observe(metrics.STAGE, seconds, stage)
        if queue is not None:
            observe(metrics.STAGE, queue, "queue")
        observe(metrics.STAGE, row.seconds["total"] + (queue or 0), "response")
        for error in errors:
            add(metrics.IMAGES, 1, type(error).__name__)
        if isinstance(row.request, RequestError):
            return
        for image, item in zip(row.request.images, row.items, strict=True):
            if not isinstance(image, RequestError):
                observe(metrics.IMAGE_BYTES, len(image))
            if item.size != (0, 0):
                observe(metrics.IMAGE_PIXELS, item.size[0] * item.size[1])
            if item.cached or item.key:
                add(metrics.CACHE_LOOKUPS, 1, "hit" if item.cached else "miss")
            if item.predictions:
                best = item.predictions[0]
                add(metrics.IMAGES, 1, "success")
                add(metrics.TOP_CLASSES, 1, str(best["class_id"]), best["class"])
                observe(metrics.CONFIDENCE, best["confidence"])

    def _describe_to_metrics(self) -> None:
        """The gauges that stay as they are until the worker ends."""
        card = self.card
        self.metrics.set(metrics.STARTUP, time() - psutil.Process().create_time())
        self.metrics.set(
            metrics.MODEL_INFO,
            1,
            card.architecture,
            card.weights.name,
            str(card.weights.trained).lower(),
            self.engine.name,
            self.engine.precision,
            self.engine.device.partition(":")[0],  # the workers' GPUs may differ
        )
        libraries = [version(name) for name in ("torchserve", "torch", "openvino")]
        self.metrics.set(
            metrics.BUILD_INFO, 1, card.inputs_sha256[:12], *libraries, platform.python_version()
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
            "decoder": self.decoder.name,
            "device": self.engine.device,
            "threads": torch.get_num_threads(),
            "libraries": {name: version(name) for name in LIBRARIES}
            | {"python": platform.python_version()},
            "packaged_with": card.packaged_with,
            "settings": asdict(self.settings),
        }
