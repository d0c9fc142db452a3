"""The limit: our handler in one process a core, without TorchServe and without HTTP.

Calls `handle` of the unpacked archive as TorchServe's worker would, on every image in turn. Prints
one JSON line for each batch size.
"""

import argparse
import json
import logging
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from threading import BrokenBarrierError
from typing import Any

from benchmarks.images import load_rgb
from service.load.images import unique_requests

START_SECONDS = 120  # until every process is ready

Result = tuple[int, float, list[float]]  # images, seconds, milliseconds of each call


@dataclass(frozen=True)
class Times:
    """Seconds."""

    warmup: float
    measured: float


def make_handler(model_dir: Path, workers: int) -> tuple[Any, Any]:
    """Our handler, ready, and its context; `workers` are the processes that share the cores."""
    import yaml
    from image_classifier import ImageClassifier  # the archive's, on PYTHONPATH
    from ts.context import Context

    config = yaml.safe_load((model_dir / "model-config.yaml").read_text("utf-8"))
    config |= {"minWorkers": workers, "maxWorkers": workers}
    manifest = json.loads((model_dir / "MAR-INF" / "MANIFEST.json").read_text("utf-8"))
    context = Context(
        "classifier", str(model_dir), manifest, 8, None, "0.12.0", model_yaml_config=config
    )
    handler = ImageClassifier()
    handler.initialize(context)
    return handler, context


def work(barrier: Any, folder: Path | None, batch: int, workers: int, times: Times) -> Result:
    """Classify as fast as this process can, at the same time as the others."""
    try:
        return _work(barrier, folder, batch, workers, times)
    except Exception:
        barrier.abort()  # or the others would wait for this one
        raise


def _work(barrier: Any, folder: Path | None, batch: int, workers: int, times: Times) -> Result:
    from ts.context import RequestProcessor

    # A worker's log lines are written as well, to nowhere.
    with Path(os.devnull).open("w") as nowhere:
        logging.basicConfig(stream=nowhere, level=logging.INFO, format="%(message)s")
        handler, context = make_handler(Path(os.environ["BENCHMARK_MODEL_DIR"]), workers)
        # No image is in a batch twice: the handler decodes those that are equal once.
        images = load_rgb(folder)
        different = list(islice(unique_requests(images), max(len(images), batch)))
        rows = ({"body": bytearray(image.body)} for image in cycle(different))

        def call() -> None:
            context.request_ids = {index: f"{index}" for index in range(batch)}
            context.request_processor = [
                RequestProcessor({"content-type": "image/jpeg"}) for _ in range(batch)
            ]
            answers = handler.handle(list(islice(rows, batch)), context)
            if any(context.get_response_status(index)[0] != 200 for index in range(batch)):
                raise RuntimeError(f"not classified: {answers}")

        barrier.wait(START_SECONDS)
        warm = time.perf_counter() + times.warmup
        while time.perf_counter() < warm:
            call()
        taken = []
        begin = now = time.perf_counter()
        while now < begin + times.measured:
            call()
            before, now = now, time.perf_counter()
            taken.append(1000 * (now - before))
        return len(taken) * batch, now - begin, taken


def measure(folder: Path | None, batch: int, processes: int, workers: int, times: Times) -> None:
    """One row. Raises what a process raised, and BrokenProcessPool if one died."""
    from service.load.measurement import percentile

    spawn = multiprocessing.get_context("spawn")
    with spawn.Manager() as manager, ProcessPoolExecutor(processes, spawn) as pool:
        barrier = manager.Barrier(processes)
        futures = [
            pool.submit(work, barrier, folder, batch, workers, times) for _ in range(processes)
        ]
        # One that fails is the cause; the others then find the barrier broken.
        errors = [error for future in futures if (error := future.exception())]
        if errors:
            raise min(errors, key=lambda error: isinstance(error, BrokenBarrierError))
        results = [future.result() for future in futures]
    taken = [ms for _, _, each in results for ms in each]
    row = {
        "batch": batch,
        "processes": processes,
        "images_per_second": sum(images / seconds for images, seconds, _ in results),
        "p50_ms": percentile(taken, 50),
        "p99_ms": percentile(taken, 99),
    }
    print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, help="JPEGs (default: drawn)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--processes", type=int, nargs="+", default=[2])
    parser.add_argument("--one-request", action="store_true", help="first, in one process")
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--warmup-seconds", type=float, default=1)
    args = parser.parse_args()
    times = Times(args.warmup_seconds, args.seconds)
    if args.one_request:  # the time of one request, with the cores that a worker has
        measure(args.images, 1, 1, max(args.processes), times)
    for processes in args.processes:
        for batch in args.batches:
            measure(args.images, batch, processes, processes, times)


if __name__ == "__main__":
    main()
