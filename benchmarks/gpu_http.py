"""One server under a few loads over HTTP, no image sent twice; a row of JSON for each load.

    python -m benchmarks.gpu_http ours|empty|stock --store DIR --loads 1x128 8x32

`python -m benchmarks.gpu` runs it for each server, with a time limit.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks.environments import SetupFailed, missing_packages, prepare, requirements_of
from benchmarks.images import load_rgb
from benchmarks.parts import print_row
from benchmarks.servers import Servers, Started, StartFailed, make_parser
from benchmarks.subjects import Subject, empty, ours, stock
from handler.machine import available_cores
from handler.model_card import ModelCard
from service.load.crew import Crew
from service.load.images import ImageRequest
from service.load.measurement import Load

WARMUP_SECONDS = 1.0  # of each load; the first one has as long again as it measures
STOCK_WORKERS, STOCK_BATCH = 4, 8  # with which the stock handler did best on a GPU
FIGURES = ("p50_ms", "p99_ms", "refused", "failed", "failures", "generator_cpu_percent")


def subject_of(name: str, servers: Servers) -> Subject:
    if name == "ours":
        return ours(servers.model, servers.precision, servers.model_options(servers.precision))
    if name == "empty":
        return empty()
    return replace(stock("as-is"), environ={"BENCHMARK_STOCK_BATCH": str(STOCK_BATCH)})


def python_of(subject: Subject, *, install: bool) -> Path:
    """Raises SetupFailed if the subject needs what is not there."""
    if subject.environment and install:
        return prepare(subject.environment)
    if subject.environment and (missing := missing_packages(requirements_of(subject.environment))):
        raise SetupFailed(f"this Python lacks {', '.join(missing)}")
    return Path(sys.executable)


@contextmanager
def busy_cores() -> Iterator[dict[str, float]]:
    """Percent of all cores that anything used, once the block is over."""
    found: dict[str, float] = {}
    psutil.cpu_percent()
    yield found
    found["machine_cpu_percent"] = psutil.cpu_percent()


def measure(
    target: Started,
    name: str,
    workers: int,
    images: Sequence[ImageRequest],
    args: argparse.Namespace,
    *,
    trained: bool,
) -> None:
    with Crew(args.generators) as crew:
        for number, (per_request, clients) in enumerate(args.loads):
            warmup = WARMUP_SECONDS + (0 if number else args.seconds)
            load = Load(concurrency=clients, seconds=args.seconds, warmup_seconds=warmup)
            with busy_cores() as cores:
                run = crew.measure(
                    target.url, images, load, per_request=per_request, classes=trained
                )
            row: dict[str, Any] = {"server": name, "workers": workers, "images": per_request}
            row |= {"clients": clients, "images_per_second": per_request * run.throughput_rps}
            print_row(**row, **{key: getattr(run, key) for key in FIGURES}, **cores)


def load_of(text: str) -> tuple[int, int]:
    """An argparse type: "8x32" is 8 images in a request, 32 clients."""
    per_request, _, clients = text.partition("x")
    return int(per_request), int(clients)


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser("gpu_http", "Load one server.", "resnet50", Path())
    add = parser.add_argument
    add("server", choices=["ours", "empty", "stock"])
    add("--folder", type=Path, required=True, help="with the packaged model")
    add("--device", choices=["cuda", "cpu"], default="cuda")
    add("--precision", default="auto")
    add("--workers", type=int, help="(None: the default of the service)")
    add("--loads", type=load_of, nargs="+", default=[(1, 128)], metavar="IMAGESxCLIENTS")
    add("--generators", type=int, default=max(1, available_cores() // 4), help="processes")
    add("--no-venv", action="store_true", help="install nothing")
    args = parser.parse_args(argv)
    workers = STOCK_WORKERS if args.server == "stock" else args.workers
    servers = Servers(
        folder=args.folder,
        model=args.model,
        weights=args.weights,
        recipe=args.recipe,
        calibration=None,
        device=args.device,
        precision=args.precision,
        workers=workers,
        images=args.images,
    )
    subject = subject_of(args.server, servers)
    images = load_rgb(args.images)
    trained = ModelCard.read(servers.model_dir(args.precision)).weights.trained
    try:
        python = python_of(subject, install=not args.no_venv)
        with servers.started(subject, python, images[0], []) as target:
            count = servers.worker_count(args.precision)
            measure(target, args.server, count, images, args, trained=trained)
    except (SetupFailed, StartFailed) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
