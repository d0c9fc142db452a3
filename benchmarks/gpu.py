"""The service on a GPU: is it right, and how fast are its parts and the whole?

    python -m benchmarks.gpu --weights FILE --recipe ENTRY --images DIR

Packages the model for the GPU, compares its probabilities and decoders with the CPU's, then
measures from the inside out: the model alone, decoding alone, the handler in one process, the
service over HTTP, and TorchServe with a handler that does nothing and the same bodies. Prints
tables; the last line is one JSON object. `--device cpu` goes the same way without a GPU, to try it.
"""

import argparse
import gc
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.conditions import conditions
from benchmarks.environments import SetupFailed
from benchmarks.gpu_parts import Parts
from benchmarks.images import load_rgb
from benchmarks.servers import Servers, StartFailed, make_parser, make_servers, say, show
from benchmarks.subjects import Subject, empty, ours
from handler.engines import load_engine
from handler.model_card import ModelCard
from handler.settings import Settings
from service.load.images import ImageRequest, as_form
from service.load.measurement import Load
from service.plots import plot

FOLDER = Path(__file__).parent / "gpu"
JSON_FILE = "gpu.json"
PLOT_FILE = "gpu.png"
FIGURES = ("p50_ms", "p99_ms", "refused", "failed", "failures", "generator_cpu_percent")


def everything(args: argparse.Namespace, servers: Servers) -> dict[str, Any]:
    """Check and measure all there is. Raises SetupFailed if the model cannot be packaged."""
    images = load_rgb(args.images)
    facts = conditions(servers, images) | device_facts(args.device)
    facts |= {"concurrency": args.concurrency, "seconds": args.seconds}
    servers.package(args.precision)
    model_dir = servers.model_dir(args.precision)
    card = ModelCard.read(model_dir)
    device = "cuda:0" if args.device == "cuda" else "cpu"
    parts = Parts(model_dir, card, device, [image.body for image in images], args.seconds)
    settings = Settings(device=args.device, precision=args.precision)
    engine = load_engine(card, model_dir, settings, gpu_id=0, workers=1)
    found: dict[str, Any] = {
        "conditions": facts,
        "engine": engine.name,
        "precision": engine.precision,
        "check": parts.check(engine),
        "model": parts.measure_model(engine),
        "decoding": parts.measure_decoding(),
    }
    del engine  # the processes that follow need the memory
    gc.collect()
    if args.device == "cuda":
        torch.cuda.empty_cache()
    say("handler in one process")
    runs, failed = servers.measure_inprocess(args.precision, args.batches, 1, args.seconds)
    found["handler"] = runs
    found["failed"] = {"handler": failed} if failed else {}
    show(runs, ("batch", "images_per_second", "p50_ms", "p99_ms"))
    found["http"] = measure_http(args, servers, images, found["failed"])
    return found


def measure_http(
    args: argparse.Namespace,
    servers: Servers,
    images: Sequence[ImageRequest],
    failed: dict[str, str],
) -> list[dict[str, Any]]:
    """Ours and the empty handler, by workers, images in a request and clients."""
    rows: list[dict[str, Any]] = []
    for workers in args.workers:
        servers = replace(servers, workers=workers)
        servers.package(args.precision)
        options = servers.model_options(args.precision)
        for subject in (ours(args.model, args.precision, options), empty()):
            say(f"{subject.what}, workers: {workers}")
            try:
                rows += measure_server(args, servers, subject, images)
            except StartFailed as exc:
                failed[f"{subject.name}, workers: {workers}"] = str(exc)
                say(f"  failed: {exc}")
    columns = ("server", "workers", "images", "clients", "images_per_second")
    show(rows, (*columns, "p50_ms", "p99_ms", "refused", "failed"))
    return rows


def measure_server(
    args: argparse.Namespace, servers: Servers, subject: Subject, images: Sequence[ImageRequest]
) -> list[dict[str, Any]]:
    rows = []
    with servers.started(subject, Path(sys.executable), images[0], []) as target:
        for count in args.per_request:
            requests = requests_of(images, count)
            for clients in args.concurrency:
                warmup = min(3.0, args.seconds)
                load = Load(concurrency=clients, seconds=args.seconds, warmup_seconds=warmup)
                run = target.measure(requests, load)
                row = {"server": subject.name, "workers": servers.workers, "images": count}
                row |= {"clients": clients, "images_per_second": count * run.throughput_rps}
                rows.append(row | {name: getattr(run, name) for name in FIGURES})
    return rows


def requests_of(images: Sequence[ImageRequest], count: int) -> list[ImageRequest]:
    """A request for each image: the JPEG itself, or a form with the `count` images from there."""
    if count == 1:
        return list(images)
    names = [f"file{number}" for number in range(1, count + 1)]
    return [
        as_form(list(islice(cycle(images), start, start + count)), names)
        for start in range(len(images))
    ]


def device_facts(device: str) -> dict[str, Any]:
    """What the figures depend on besides the machine."""
    if device == "cpu":
        return {"device": "cpu"}
    facts = torch.cuda.get_device_properties(0)
    return {
        "device": facts.name,
        "device_memory_gib": round(facts.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
    }


def plot_parts(report: Mapping[str, Any], path: Path) -> None:
    """Images a second from the inside out: the best of each part."""
    bars = {
        "model alone": max(row["images_per_second"] for row in report["model"]),
        **{f"decoding, {row['decoder']}": row["images_per_second"] for row in report["decoding"]},
        "handler": max((row["images_per_second"] for row in report["handler"]), default=0),
    }
    for row in report["http"]:
        name = f"{row['server']}, workers: {row['workers']}, images: {row['images']}"
        bars[name] = max(bars.get(name, 0), row["images_per_second"])
    with plot(path, 9, 1 + 0.3 * len(bars)) as axes:
        axes.barh(range(len(bars)), list(bars.values()))
        axes.set_yticks(range(len(bars)), list(bars))
        axes.invert_yaxis()
        axes.set_xlabel(f"images a second, {report['conditions']['device']}, {report['engine']}")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("gpu", "Check and measure the service on a GPU.", "resnet50", FOLDER)
    add = parser.add_argument
    add("--device", choices=["cuda", "cpu"], default="cuda")
    add("--precision", default="auto", help="as for ./scripts/serve")
    add("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    add("--concurrency", type=int, nargs="+", default=[1, 32, 128])
    add("--per-request", type=int, nargs="+", default=[1, 8], metavar="IMAGES")
    add("--batches", type=int, nargs="+", default=[8, 32, 64], help="in one process, besides 1")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: torch sees no GPU here; --device cpu tries the same without", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    options = {"device": args.device, "precision": args.precision}
    with make_servers(args, **options, workers=args.workers[0]) as servers:
        try:
            found = everything(args, servers)
        except SetupFailed as exc:
            print(f"error: {exc}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return 130
    (args.out / JSON_FILE).write_text(json.dumps(found, indent=1) + "\n")
    plot_parts(found, args.out / PLOT_FILE)
    print(json.dumps(found))
    wrong = [run for run in found["http"] if run["failed"] or not run["images_per_second"]]
    return 0 if found["check"]["passed"] and not wrong and not found["failed"] else 1


if __name__ == "__main__":
    sys.exit(main())
