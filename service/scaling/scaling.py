"""Have more or fewer workers of a running model."""

import sys
import time
from collections.abc import Sequence
from threading import Event

import requests

from service.plan import workers_for
from service.processes import wait_until
from service.scaling.memory import (
    count_fitting,
    headroom_of,
    mebibytes,
    missing_checks,
    process_memory,
)
from service.scaling.model import Model
from service.tables import text_table
from service.torchserve.config import ServerConfig
from service.torchserve.management import ModelState, Worker

POLL_SECONDS = 0.5
TELL_SECONDS = 5  # between two lines while nothing changes
QUIET_SECONDS = 10  # until workers are stopped all the same


class ScalingFailed(Exception):
    """The model has another number of workers than was asked for."""


def scale(model: Model, workers: int | None, *, force: bool, timeout: float) -> None:
    """Change the number of workers once, wait until it is so, and print how it goes.

    None is as many as ./scripts/serve starts by itself. `force` is to start more than memory holds;
    `timeout` is seconds until all are READY. Raises ScalingFailed, UnknownModel, InvalidSettings
    and requests.RequestException.
    """
    state = model.describe()
    print(worker_table(state.workers))
    if workers is None:
        workers = workers_for(ServerConfig.load().usable_gpus() if state.on_gpu else 0)
    more = workers - len(state.workers)
    if more > 0:
        check_memory(state, more, force)
    elif more < 0 and not is_quiet(model):
        print(
            "warning: requests that the stopped workers have in hand are answered with 500",
            file=sys.stderr,
        )
    model.resize(workers)
    state = wait_until_ready(model, workers, timeout)
    print(worker_table(state.workers))
    if not len(state.workers) == state.ready == workers:
        raise ScalingFailed(
            f"{state.ready} of {workers} workers are READY after {timeout} s; the cause is in "
            "the server's log"
        )


def check_memory(state: ModelState, more: int, force: bool) -> None:
    """Raise ScalingFailed if so many more workers do not fit; `force` makes that a warning."""
    headroom = headroom_of(state)
    for note in missing_checks(headroom, state.on_gpu):
        print(f"note: {note}")
    fitting = count_fitting(headroom, more)
    if fitting < more:
        facts = "; ".join(map(str, headroom))
        message = f"{more} more do not fit, {fitting} do ({facts})"
        if not force:
            raise ScalingFailed(f"{message}; --force starts them all the same")
        print(f"warning: {message}", file=sys.stderr)


def is_quiet(model: Model) -> bool:
    """Whether there is a moment without requests, to stop workers at; prints why not."""
    try:
        if model.wait_until_quiet(QUIET_SECONDS, Event()):
            return True
        print(f"note: in {QUIET_SECONDS} s the model was never without requests")
    except requests.RequestException as exc:
        print(f"note: {model.metrics} does not answer: {type(exc).__name__}")
    return False


def wait_until_ready(model: Model, workers: int, seconds: float) -> ModelState:
    """The state when all workers are READY, or at the deadline; prints the progress."""
    started = time.monotonic()
    state, told = model.describe(), None

    def is_done() -> bool:
        nonlocal state, told
        state, passed = model.describe(), time.monotonic() - started
        news = (state.ready, passed // TELL_SECONDS)
        if news != told:
            print(f"{state.ready} of {workers} workers READY after {passed:.1f} s", flush=True)
            told = news
        return len(state.workers) == state.ready == workers

    wait_until(is_done, seconds, POLL_SECONDS)
    return state


def worker_table(workers: Sequence[Worker]) -> str:
    headings = ("worker", "pid", "device", "memory", "state")
    rows = []
    for worker in workers:
        memory = process_memory(worker.pid)
        size = mebibytes(memory) if memory else None
        rows.append((worker.id, worker.pid, worker.device, size, worker.status))
    return "\n".join(text_table(headings, rows, left=range(len(headings))))
