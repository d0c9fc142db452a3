"""The TorchServe handler: glue between TorchServe's rows and the modules that do the work.

TorchServe accepts exactly one class in this module (ts/model_loader.py).
"""

import gc
import logging
import platform
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from time import perf_counter, time
from typing import Any

from handler import metrics
from handler.accounting import Accounts, describe_answers, describe_worker, milliseconds
from handler.answers import best_class_ids, best_classes, encode, success
from handler.base import BaseHandler
from handler.batch import Batch, Row, check_deadline
from handler.cache import ResultCache
from handler.certificate import certify
from handler.collector import Metrics
from handler.confidence import Confidence, check_asked
from handler.decoders import choose_decoder
from handler.engines import load_engine, share_of_cores
from handler.errors import MalformedRequest, ModelFailed, OutOfResources, RequestError, SetupError
from handler.failures import GPU_FAILED, Failures
from handler.golden import limit_of
from handler.gpus import open_gauges
from handler.headers import is_probe, read_deadline, wants_best_classes
from handler.logs import log_line, quiet_torchserve, set_level, silence_torchserve
from handler.model_card import ModelCard
from handler.payloads import ImageRequest, protocol_of, read_request
from handler.pipeline import warm_up
from handler.pulse import Pulse, count_hung
from handler.receiving import read_ahead
from handler.replies import Reply, make_reply, refuse
from handler.resize import region_of
from handler.settings import Settings
from handler.shared_cache import SharedCache, scope_of
from handler.slots import claim_slot
from handler.torchserve_metrics import leave_out_prediction_time, torchserve_emit

LIBRARIES = """
    torchserve torch torchvision openvino simplejpeg pillow numpy safetensors orjson multipart
""".split()


class ImageClassifier(BaseHandler):
    """Answers image classification requests; each worker has one instance."""

    may_end = True  # its process, if nothing more will come of it: TorchServe starts another

    def initialize(self, context: Any) -> None:
        """Load settings, model and engine, and warm up. Called once, before the worker is READY.

        Raises RuntimeError if the worker cannot start: TorchServe reports no other kind.
        """
        started = perf_counter()
        try:
            self._load(context)
        except Exception as exc:
            expected = isinstance(exc, SetupError) and exc.__cause__ is None
            log_line(
                logging.ERROR,
                "startup_failed",
                model=context.model_name,
                message=str(exc),
                cause=None if expected else traceback.format_exc(),
            )
            if self.may_end:
                silence_torchserve()
            raise RuntimeError(str(exc)) from exc
        # What was loaded stays for good: a full collection, in the middle of a request, would go
        # through all of torch and find nothing.
        gc.collect()
        gc.freeze()
        describe_worker(self.metrics, self.card, self.engine, self.certificate)
        self.metrics.readers.append(open_gauges(self.engine.device))
        self.metrics.start()
        self.accounts.start()  # after the metrics, because at the exit the last comes first
        if self.may_end:
            self.pulse.start()
        quiet_torchserve()
        if context.metrics:
            leave_out_prediction_time(context.metrics)
        read_ahead()
        self.initialized = True
        log_line(
            logging.INFO if self.card.weights.trained else logging.WARNING,
            "model_ready",
            **self.identity,
            engine=self.engine.name,
            device=self.engine.device,
            threads=self.threads,
            certificate_ms=self.certificate and milliseconds(self.certificate.seconds),
            startup_ms=milliseconds(perf_counter() - started),
        )

    def _load(self, context: Any) -> None:
        """Everything of a start that may fail."""
        self.context = context
        config = context.model_yaml_config or {}
        model_dir = Path(context.system_properties["model_dir"])
        self.settings = Settings.load(config.get("handler"))
        set_level(self.settings.log_level)
        self.version = str(context.manifest["model"]["modelVersion"])
        emit, slot = torchserve_emit(), claim_slot(model_dir)
        self.metrics = Metrics(emit, context.model_name, self.version, slot)
        self.metrics.add(metrics.STARTS, 1)
        self.metrics.add(metrics.HUNG, count_hung(model_dir))
        self.metrics.flush()  # before what may fail
        self.metrics.set(metrics.STARTUP, 0)
        self.card = ModelCard.read(model_dir)
        self.card.check_files(model_dir)
        self.confidence = Confidence.read(self.card, model_dir)
        if not self.card.weights.trained and not self.settings.allow_untrained:
            raise SetupError("the weights are untrained, and allow_untrained is false")
        self.identity = {  # what every answer and log line says about the model
            "model": context.model_name,
            "version": self.version,
            "weights": self.card.weights.name,
        }
        self.failures = Failures(self.identity, self._hand_over if self.may_end else None)
        gpu_id, workers = context.system_properties.get("gpu_id"), config.get("minWorkers", 1)
        self.engine = load_engine(self.card, model_dir, self.settings, gpu_id, workers=workers)
        self._warn_of_errors()
        self.threads = share_of_cores(self.settings, workers)
        decoder, reason = choose_decoder(
            self.card.transform, self.settings, self.engine.device, self.threads
        )
        if reason:
            log_line(logging.WARNING, "decoder_chosen", decoder=decoder.name, **reason)
        self.certificate, self.decoder, self.settings = certify(
            self.card, model_dir, self.settings, self.engine, decoder, self.threads
        )
        constants = describe_answers(self.card, self.engine, self.decoder, self.settings)
        self.accounts = Accounts(
            self.metrics,
            self.identity | constants,
            self.settings.log_requests,
            self.card.reference,
            self.confidence,
        )
        size = self.settings.cache_bytes
        self.cache = ResultCache(size) if size else None
        self.shared = None
        if self.settings.cache_url:
            scope = scope_of(self.card, self.engine, self.decoder, self.settings)
            self.shared = SharedCache(self.settings, scope, len(self.card.labels), self.metrics)
        started = perf_counter()
        step_seconds = warm_up(
            self.engine,
            self.card.transform,
            config.get("batchSize", 1),
            self.settings.warmup_batches,
            self.settings.max_image_pixels,
        )
        self.metrics.set(metrics.WARM_UP, perf_counter() - started)
        self.pulse = Pulse(model_dir, step_seconds)

    def _warn_of_errors(self) -> None:
        """Say which engines do not give the reference's answers, used or not."""
        errors = dict(self.engine.refused)
        found = self.engine.sameness
        if found and not found.fits(limit_of(self.engine.precision)):
            errors[self.engine.name] = found
        if errors:
            log_line(
                logging.WARNING,
                "engine_chosen",
                engine=self.engine.name,
                golden_errors={
                    name: round(one.error, 4) if isfinite(one.error) else None
                    for name, one in errors.items()
                },
                agreement={name: round(one.agreement, 4) for name, one in errors.items()},
            )

    def _hand_over(self) -> None:
        """Write what was counted and not yet written: the process is about to end."""
        self.accounts.settle()
        self.metrics.flush()

    def handle(self, data: list[Mapping[str, Any]], context: Any) -> list[bytes]:
        """Answer a batch: one answer for each row, in order, whatever happens to its neighbours."""
        self.context = context
        if self._is_info(data):
            return [encode(self.describe_handle())]
        started, arrival = perf_counter(), time()
        with self.pulse.batch():
            rows = self.inference(self.preprocess(data))
            answers = self.postprocess(rows)
        self.accounts.add(rows, perf_counter() - started, arrival)
        return answers

    def _is_info(self, data: list[Mapping[str, Any]]) -> bool:
        """Whether TorchServe asks for `describe_handle`, and not a client with such a header.

        An empty row of a client comes from a form that TorchServe could not read, and has its type.
        """
        if len(data) != 1 or data[0]:
            return False
        headers = self._headers(0)
        return headers.get("describe") == "True" and "content-type" not in headers

    def _headers(self, index: int) -> dict[str, Any]:
        """A request's headers in lower case; TorchServe keeps the client's spelling."""
        headers = self.context.get_all_request_header(index)
        return {name.lower(): value for name, value in headers.items()}

    def preprocess(self, data: list[Mapping[str, Any]]) -> tuple[Batch, list[Row]]:
        """TorchServe's rows to Rows with images whose decoding has begun, or with errors."""
        batch = Batch(
            self.settings, self.decoder, self.cache, self.shared, self.failures, self.pulse.step
        )
        if self.confidence:
            batch.temperature = self.confidence.temperature
        arrival = time()
        unopened: Iterable[Row] = (
            self._read_row(index, fields, arrival) for index, fields in enumerate(data)
        )
        if self.shared:  # one question for all rows: they are all read before one is opened
            unopened = list(unopened)
            batch.recall(unopened, self.shared)
        rows = []
        for row in unopened:
            started = perf_counter()
            if isinstance(row.request, ImageRequest):
                row.images = batch.open_images(
                    row.request.images,
                    row.request_id,
                    classes=row.classes,
                    explain=row.request.explain,
                    deadline=read_deadline(row.headers, arrival),
                )
            row.seconds["preprocess"] += perf_counter() - started
            rows.append(row)
        return batch, rows

    def _read_row(self, index: int, fields: Mapping[str, Any], arrival: float) -> Row:
        """A Row whose images are still as they were sent."""
        started = perf_counter()
        request_id, headers = self.context.get_request_id(index), self._headers(index)
        row = Row(request_id, headers, self._read(request_id, fields, headers, arrival))
        if isinstance(row.request, RequestError):
            row.protocol = protocol_of(fields, headers)
        else:
            row.protocol = row.request.protocol
            if not is_probe(headers) and not row.request.explain:
                row.classes = row.request.classes_of(len(self.card.labels))
        row.seconds["preprocess"] = perf_counter() - started
        return row

    def _read(
        self,
        request_id: str,
        fields: Mapping[str, Any],
        headers: Mapping[str, Any],
        arrival: float,
    ) -> ImageRequest | RequestError:
        if self.failures.gpu_lost:
            return OutOfResources(GPU_FAILED)
        try:
            check_deadline(read_deadline(headers, arrival))
            request = read_request(fields, headers, len(self.card.labels), self.settings)
            check_asked(self.confidence, request.level, request.unknown)
            if request.explain:
                self._check_inspectable(request_id)
            return request
        except RequestError as error:
            return error
        except Exception as bug:  # of ours: one client's 500, not the whole batch's 503
            message = "the request could not be read"
            return self.failures.error_of_one(message, [request_id], bug)

    def _check_inspectable(self, request_id: str) -> None:
        """Raise RequestError if answers cannot be explained; the first time a pass finds it out."""
        try:
            inspectable = self.engine.inspectable
        except Exception as exc:
            raise self.failures.error_of(exc, [request_id], self.engine) from exc
        if not inspectable:
            raise MalformedRequest(
                f"answers of {self.card.architecture} cannot be explained: the network must "
                "end in one linear layer over the mean of its last maps; ask without explain"
            )

    def inference(self, preprocessed: tuple[Batch, list[Row]]) -> list[Row]:
        """Give every image of every row its outcome, in passes that the rows share."""
        batch, rows = preprocessed
        started = perf_counter()
        waited = batch.classify(self.engine)
        seconds = perf_counter() - started
        for row in rows:
            if any(image.decoding and image.decoding.picture for image in row.images):
                # What was waited for decoding belongs to the stage before.
                row.seconds["preprocess"] += waited
                row.seconds["inference"] = seconds - waited
        return rows

    def postprocess(self, rows: list[Row]) -> list[bytes]:
        """A body for each row; sets its status and headers in the context."""
        answers = []
        for index, row in enumerate(rows):
            started = perf_counter()
            reply = self._reply(row)
            row.status = reply.status
            # The phrase stays empty: TorchServe loses step with the worker over non-ASCII ones.
            self.context.set_response_status(row.status, "", index)
            for name, value in reply.headers.items():
                self.context.set_response_header(index, name, value)
            # Which version it was, and that it was us: TorchServe's own errors do not have it.
            self.context.set_response_header(index, "X-Model-Version", self.version)
            if wants_best_classes(row.headers) and (ids := best_class_ids(row.results)):
                self.context.set_response_header(index, "X-Best-Classes", ids)
            answers.append(reply.body)
            row.seconds["postprocess"] = perf_counter() - started
        return answers

    def _reply(self, row: Row) -> Reply:
        """The reply to one row."""
        request = row.request
        if isinstance(request, RequestError):
            row.errors.append(request)
            return refuse(request, row.protocol)
        probabilities = []
        for image, filename in zip(row.images, request.filenames, strict=True):
            outcome = image.outcome or ModelFailed("the image was not classified")
            if isinstance(outcome, RequestError):
                row.add_failure(outcome)
                continue
            metadata = {
                "filename": filename,
                "inference_time": round(row.seconds.get("inference", 0), 6),
                **self.identity,
                "device": self.engine.device,
                "engine": self.engine.name,
                "image_size": outcome.size,
                "decode": outcome.decode,
                "cached": image.cached,
                "calibrated": self.confidence is not None,
                "request_id": row.request_id,
            }
            if request.level is not None:
                metadata["set_level"] = request.level
            predictions = best_classes(outcome.probabilities, request.top_k, self.card.labels)
            result = success(predictions, metadata)
            if self.confidence:
                pixels = image.pixels if request.unknown else None
                result |= self.confidence.judge(
                    outcome.probabilities, request.level, pixels, self.card.labels
                )
            if request.explain:
                try:
                    region = region_of(outcome.size, self.card.transform)
                    explanation = image.explanation(request.explain, region, self.card.labels)
                except Exception as bug:
                    message = "the answer could not be explained"
                    row.add_failure(self.failures.error_of_one(message, [row.request_id], bug))
                    continue
                self.pulse.step()
                result["explanation"] = explanation
            row.results.append(result)
            probabilities.append(outcome.probabilities)
        return make_reply(request, row.results, probabilities, self.card.labels, self.identity)

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
            "certificate": self.certificate and asdict(self.certificate),
            "int8": card.int8,
            "confidence": card.confidence and asdict(card.confidence),
            "decoder": self.decoder.name,
            "gpu_samplings": self.decoder.samplings,
            "device": self.engine.device,
            "threads": self.threads,
            "libraries": {name: version(name) for name in LIBRARIES}
            | {"python": platform.python_version()},
            "packaged_with": card.packaged_with,
            "shared_cache": self.shared.describe() if self.shared else None,
            # The gateway shows this to the network, which an address and a password do not concern.
            "settings": asdict(self.settings) | {"cache_url": self.settings.cache_url and "set"},
        }
