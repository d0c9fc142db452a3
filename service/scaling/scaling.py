"""Have more or fewer workers of a running model, or let their number follow the load (--watch)."""

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from threading import Event
from typing import Any

import requests

from handler.errors import SetupError
from service.archive.store import workers_for
from service.options import RANGES, number
from service.scaling.autoscaler import Autoscaler, Watcher
from service.scaling.workers import (
    Model,
    Space,
    State,
    UnknownModel,
    Worker,
    count_fitting,
    find_spaces,
    mebibytes,
)
from service.tables import text_table
from service.torchserve.server import read_config, usable_gpus

POLL_SECONDS = 0.5
TELL_SECONDS = 5  # between two lines while nothing changes
QUIET_SECONDS = 10  # until workers are stopped all the same


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    model = Model(args.management.rstrip("/"), args.metrics.rstrip("/"), args.model, args.version)
    try:
        if args.watch:
            return run_watch(args, model)
        return scale(args, model)
    except (UnknownModel, SetupError) as exc:
        print(f"error: {exc}", file=sys.stderr)
    except requests.HTTPError as exc:
        answer = " ".join(exc.response.text.split())
        print(f"error: HTTP {exc.response.status_code} of the server: {answer}", file=sys.stderr)
    except requests.RequestException as exc:
        print(f"error: {args.management} does not answer: {type(exc).__name__}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options; exits with 2 and one line where they are wrong."""
    workers = number(*RANGES["workers"])
    milliseconds, seconds = number(1, 600_000), number(1, 86_400)
    parser = argparse.ArgumentParser(
        prog="./scripts/scale", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("model", help="its name in the server")
    parser.add_argument(
        "workers",
        nargs="?",
        metavar="N|auto",
        type=lambda text: text if text == "auto" else workers(text),
        help="auto: what ./scripts/serve --workers auto gives on this machine and all visible GPUs",
    )
    parser.add_argument(
        "--management", default="http://127.0.0.1:8081", help="address (%(default)s)"
    )
    parser.add_argument("--metrics", default="http://127.0.0.1:8082", help="address (%(default)s)")
    parser.add_argument("--version", help="of the model (the default one)")
    parser.add_argument(
        "--force", action="store_true", help="also where memory does not suffice for more workers"
    )
    parser.add_argument(
        "--timeout",
        metavar="S",
        type=seconds,
        default=300,
        help="until all workers are READY (%(default)s)",
    )
    group = parser.add_argument_group("autoscaler")
    group.add_argument("--watch", action="store_true", help="let the number follow the load")
    for option, default, kind, text in (
        ("--minimum", 1, workers, "fewest workers"),
        ("--maximum", 8, workers, "most workers"),
        ("--queue-ms", 50, milliseconds, "mean time in the queue above which there are more"),
        ("--cool-down", 60, seconds, "quiet seconds until there is one fewer"),
        ("--interval", 5, seconds, "seconds between two looks"),
    ):
        group.add_argument(
            option, metavar="N", type=kind, default=default, help=f"{text} (%(default)s)"
        )
    args = parser.parse_intermixed_args(argv)  # the number may follow the options
    if args.watch == (args.workers is not None):
        parser.error("give either a number of workers (or auto), or --watch")
    if args.minimum > args.maximum:
        parser.error(f"--minimum is {args.minimum}, more than --maximum, {args.maximum}")
    for name in ("management", "metrics"):
        if not getattr(args, name).startswith(("http://", "https://")):
            parser.error(f"--{name} must be http://HOST:PORT, got {getattr(args, name)!r}")
    return args


def scale(args: argparse.Namespace, model: Model) -> int:
    """Change the number once and wait until it is so; the exit status."""
    state = model.describe()
    print(table(state.workers))
    on_gpu = any(worker.device != "cpu" for worker in state.workers)
    wanted = args.workers
    if wanted == "auto":
        wanted = workers_for(usable_gpus(read_config()) if on_gpu else 0)
    more = wanted - len(state.workers)
    if more > 0:
        spaces = spaces_of(state)
        for note in missing_checks(spaces, on_gpu):
            print(f"note: {note}")
        fitting = count_fitting(spaces, more)
        if fitting < more:
            facts = "; ".join(map(str, spaces))
            message = f"{more} more do not fit, {fitting} do ({facts})"
            if not args.force:
                print(f"error: {message}; --force goes on all the same", file=sys.stderr)
                return 1
            print(f"warning: {message}", file=sys.stderr)
    elif more < 0 and not is_quiet(model):
        print(
            "warning: requests that the stopped workers have in hand are answered with 500",
            file=sys.stderr,
        )
    model.resize(wanted)
    state = wait_until_ready(model, wanted, args.timeout)
    print(table(state.workers))
    if len(state.workers) == state.ready == wanted:
        return 0
    print(
        f"error: {state.ready} of {wanted} workers are READY after {args.timeout} s; the cause is "
        "in the server's log",
        file=sys.stderr,
    )
    return 1


def is_quiet(model: Model) -> bool:
    """Whether there is a moment without requests, to stop workers at; says why not."""
    try:
        if model.wait_until_quiet(QUIET_SECONDS, Event()):
            return True
        print(f"note: in {QUIET_SECONDS} s the model was never without requests")
    except requests.RequestException as exc:
        print(f"note: {model.metrics} does not answer: {type(exc).__name__}")
    return False


def wait_until_ready(model: Model, wanted: int, seconds: float) -> State:
    """The state when all workers are READY, or at the deadline; prints how far it is."""
    started = time.monotonic()
    told, told_at = None, started
    while True:
        state, now = model.describe(), time.monotonic()
        if told != state.ready or now - told_at > TELL_SECONDS:
            print(
                f"{state.ready} of {wanted} workers READY after {now - started:.1f} s", flush=True
            )
            told, told_at = state.ready, now
        if len(state.workers) == state.ready == wanted or now - started > seconds:
            return state
        time.sleep(POLL_SECONDS)


def table(workers: Sequence[Worker]) -> str:
    """The workers for people."""
    headings = ("worker", "pid", "device", "memory", "state")
    rows = [
        (w.id, w.pid, w.device, mebibytes(w.memory) if w.memory else None, w.status)
        for w in workers
    ]
    return "\n".join(text_table(headings, rows, left=range(len(headings))))


def spaces_of(state: State) -> list[Space]:
    """What memory there is for more workers of a model."""
    on_gpu = any(worker.device != "cpu" for worker in state.workers)
    nvml = open_nvml() if on_gpu else None
    return find_spaces(state.workers, nvml)


def open_nvml() -> Any:
    """The module pynvml, ready for use; None without NVIDIA's driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def missing_checks(spaces: Sequence[Space], on_gpu: bool) -> list[str]:
    """What was not held against the memory that there is."""
    notes = []
    if all(space.name != "memory" for space in spaces):
        notes.append("memory is not checked: no worker of the model runs on this machine")
    if on_gpu and all(space.name == "memory" for space in spaces):
        notes.append("the GPUs' memory is not checked: NVML sees no worker of the model here")
    return notes


def run_watch(args: argparse.Namespace, model: Model) -> int:
    """Follow the load until SIGTERM or Ctrl-C."""
    stop = Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: stop.set())
    autoscaler = Autoscaler(args.minimum, args.maximum, args.queue_ms, args.cool_down)
    Watcher(model, autoscaler, spaces_of, args.interval, stop).run()
    return 0
