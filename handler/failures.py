"""What goes wrong on our side: the cause to the log, and an error without it to the clients."""

import logging
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from threading import Thread, Timer

import torch

from handler.engine import Engine
from handler.errors import ModelFailed, OutOfResources, RequestError
from handler.logs import log_line

GPU_FAILED = "the GPU failed; a new worker is starting, retry shortly"
ANSWER_SECONDS = 0.5  # for the last answers to reach their clients


class Failures:
    """Reports the failures of a worker, and ends it if its GPU is lost."""

    gpu_lost = False  # nothing will be classified any more

    def __init__(
        self, identity: Mapping[str, str], flush: Callable[[], None] | None = None
    ) -> None:
        """`identity` goes into every line; `flush` hands over the metrics before the end.

        Without it this process is no worker's, and is not ended.
        """
        self._identity = identity
        self._flush = flush

    def report(
        self,
        message: str,
        request_ids: Sequence[str],
        exc: Exception | None = None,
        event: str = "failure",
    ) -> ModelFailed:
        """Log a failure under the requests' ids; the client gets the message alone."""
        cause = "".join(traceback.format_exception(exc)) if exc else message
        log_line(logging.ERROR, event, **self._identity, requests=request_ids, cause=cause)
        return ModelFailed(message)

    def error_of_one(
        self, message: str, request_ids: Sequence[str], exc: Exception
    ) -> RequestError:
        """The error for one request or image that could not be read or decoded.

        A bug of ours, unless memory was short: then another worker may have enough.
        """
        failed = self.report(message, request_ids, exc)
        if isinstance(exc, MemoryError):
            return OutOfResources("the worker has no memory for the image now; try again later")
        return failed

    def error_of(self, exc: Exception, request_ids: Sequence[str], engine: Engine) -> RequestError:
        """The error for all images of a forward pass that raised `exc`.

        They all have one shape, so it is not one of them that fails.
        """
        if isinstance(exc, torch.OutOfMemoryError):
            self.report("out of memory", request_ids, exc)
            exc.__traceback__ = None  # its frames hold tensors
            with suppress(RuntimeError):
                torch.cuda.empty_cache()
            return OutOfResources("the GPU has no memory for the image now; try again later")
        if self.gpu_lost or engine.is_lost():
            if not self.gpu_lost:
                self.gpu_lost = True
                self.report("the GPU is lost", request_ids, exc, event="gpu_lost")
                if self._flush:
                    _end_worker(self._flush)
            return OutOfResources(GPU_FAILED)
        return self.report("the model failed", request_ids, exc)


def _end_worker(flush: Callable[[], None]) -> None:
    """End the process once its answers are out: only a new one gets the GPU back."""

    def end() -> None:
        flushing = Thread(target=flush, daemon=True)
        flushing.start()
        flushing.join(ANSWER_SECONDS)  # NVML may hang with the GPU
        os._exit(1)

    timer = Timer(ANSWER_SECONDS, end)
    timer.daemon = True
    timer.start()
