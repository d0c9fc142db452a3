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
from itertools import cycle, islice
from pathlib import Path
from typing import Any

Result = tuple[int, float, list[float]]  # images, seconds, milliseconds of each call


def make_handler(model_dir: Path) -> tuple[Any, Any]:
    """Our handler, ready, and its context."""
    import yaml
    from image_classifier import ImageClassifier  # the archive's, on PYTHONPATH
    from ts.context import Context

    config = yaml.safe_load((model_dir / "model-config.yaml").read_text("utf-8"))
    manifest = json.loads((model_dir / "MAR-INF" / "MANIFEST.json").read_text("utf-8"))
    context = Context(
        "classifier", str(model_dir), manifest, 8, None, "0.12.0", model_yaml_config=config
    )
    handler = ImageClassifier()
    handler.initialize(context)
    return handler, context


def work(
    barrier: Any, images: list[bytes], batch: int, warmup_seconds: float, seconds: float
) -> Result:
    """Classify as fast as this process can, at the same time as the others."""
    from ts.context import RequestProcessor

    # A worker's log lines are written as well, to nowhere.
    with Path(os.devnull).open("w") as nowhere:
        logging.basicConfig(stream=nowhere, level=logging.INFO, format="%(message)s")
        handler, context = make_handler(Path(os.environ["BENCHMARK_MODEL_DIR"]))
        rows = ({"body": bytearray(image)} for image in cycle(images))

        def call() -> None:
            context.request_ids = {index: f"{index}" for index in range(batch)}
            context.request_processor = [
                RequestProcessor({"content-type": "image/jpeg"}) for _ in range(batch)
            ]
            answers = handler.handle(list(islice(rows, batch)), context)
            if any(context.get_response_status(index)[0] != 200 for index in range(batch)):
                raise RuntimeError(f"not classified: {answers}")

        barrier.wait()
        warm = time.perf_counter() + warmup_seconds
        while time.perf_counter() < warm:
            call()
        times = []
        begin = now = time.perf_counter()
        while now < begin + seconds:
            call()
            before, now = now, time.perf_counter()
            times.append(1000 * (now - before))
        return len(times) * batch, now - begin, times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, help="JPEGs (default: drawn)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--warmup-seconds", type=float, default=1)
    args = parser.parse_args()

    from benchmarks.images import load_rgb
    from service.load.measurement import percentile

    images = [picture.body for picture in load_rgb(args.images)]
    spawn = multiprocessing.get_context("spawn")
    # One process at batch 1: the time of one request. One a core: the limit of throughput.
    for batch, processes in [(1, 1), *((batch, args.processes) for batch in args.batches)]:
        with spawn.Manager() as manager, spawn.Pool(processes) as pool:
            barrier = manager.Barrier(processes)
            task = (barrier, images, batch, args.warmup_seconds, args.seconds)
            results = pool.starmap(work, [task] * processes, chunksize=1)
        times = [time for _, _, times in results for time in times]
        line = {
            "batch": batch,
            "processes": processes,
            "images_per_second": sum(images / seconds for images, seconds, _ in results),
            "p50_ms": percentile(times, 50),
            "p99_ms": percentile(times, 99),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
