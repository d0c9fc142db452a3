"""The service on a GPU: is it right, and how fast are its parts and the whole?

    python -m benchmarks.gpu --weights FILE --recipe ENTRY --images DIR

Packages the model for the GPU, holds its probabilities and decoders against the CPU's, then
measures from the inside out: the model alone, decoding alone, the handler in one process, the
service over HTTP, and TorchServe with a handler that does nothing and the same bodies. Prints
tables; the last line is one JSON object. `--device cpu` goes the same way without a GPU, to try it.
"""

import argparse
import asyncio
import gc
import json
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from benchmarks.report import draw, table
from benchmarks.run import Run, StartFailed, say
from benchmarks.subjects import Subject, empty, ours
from handler.decoders import CpuDecoder, DecodeJpegs, Decoder, GpuDecoder, choose_decoder, nvjpeg
from handler.engine import Engine
from handler.engines import load_engine
from handler.errors import SetupError
from handler.images import open_image, read_picture
from handler.machine import available_cores
from handler.model_card import ModelCard
from handler.settings import Settings
from service.load.generator import BOUNDARY, Expectations, Load, Picture, measure

FOLDER = Path(__file__).parent / "gpu"
JSON_FILE = "gpu.json"
PLOT_FILE = "gpu.png"
# Of any probability, against torch on the CPU in fp32. 16 bits are off by 0.1 in single images
# (bf16, MobileNetV2, measured on a CPU): there, the best class must mostly stay.
TOLERANCE = 0.003
MINIMUM_AGREEMENT = 0.97
IN_FLIGHT = 2  # forward passes that are under way at once
DECODED_TOGETHER = 64  # images


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: torch sees no GPU here; --device cpu tries the same without", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        try:
            report = Bench(args, Path(folder)).everything()
        except SetupError as exc:
            print(f"error: {exc}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return 130
    (args.out / JSON_FILE).write_text(json.dumps(report, indent=1) + "\n")
    plot(report, args.out / PLOT_FILE)
    print(json.dumps(report))
    wrong = [run for run in report["http"] if run["failed"] or not run["images_per_second"]]
    return 0 if report["check"]["passed"] and not wrong and not report["failed"] else 1


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Check and measure the service on a GPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--weights", default="untrained", metavar="untrained|FILE")
    parser.add_argument("--recipe", metavar="ENTRY", help="as for ./scripts/serve")
    parser.add_argument("--precision", default="auto", help="as for ./scripts/serve")
    parser.add_argument("--images", type=Path, metavar="DIR", help="JPEGs (None: drawn)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("--per-request", type=int, nargs="+", default=[1, 8], metavar="IMAGES")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[8, 32, 64], help="in one process, besides 1"
    )
    parser.add_argument("--seconds", type=float, default=8, help="of each measurement")
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="DIR")
    args = parser.parse_args(argv)
    if args.images:
        args.images = args.images.resolve()
    if args.weights != "untrained":
        args.weights = Path(args.weights).resolve()
    # What benchmarks.run asks for as well.
    args.precisions, args.calibration, args.rounds, args.seed = [args.precision], None, 1, 0
    args.warmup_seconds = min(3.0, args.seconds)
    args.only = []
    return args


def jpeg_decoder(device: str) -> DecodeJpegs:
    """nvJPEG on a GPU; torchvision's libjpeg if all of this is tried on a CPU."""
    return nvjpeg(device) if device != "cpu" else partial(decode_jpeg, mode=ImageReadMode.RGB)


class Bench(Run):
    """The servers, environments and checks of benchmarks.run, on another device."""

    def _model_options(self, precision: str) -> list[object]:
        args = self.args
        options: list[object] = ["--model", args.model, "--weights", args.weights]
        options += ["--device", args.device, "--workers", self.workers]
        if precision != "auto":
            options += ["--precision", precision]
        if args.recipe:
            options += ["--recipe", args.recipe]
        return options

    def everything(self) -> dict[str, Any]:  # type: ignore[override]
        self.workers = self.args.workers[0]
        self.package()
        model_dir = self.model_dirs[self.args.precision]
        self.card = ModelCard.read(model_dir)
        self.device = "cuda:0" if self.args.device == "cuda" else "cpu"
        settings = Settings(device=self.args.device, precision=self.args.precision)
        engine = load_engine(self.card, model_dir, settings, gpu_id=0, workers=1)
        report = {
            "conditions": self.data["conditions"] | device_facts(self.args.device),
            "engine": engine.name,
            "precision": engine.precision,
            "check": self.check(engine, model_dir),
            "model": self.measure_model(engine),
            "decoding": self.measure_decoding(),
        }
        report["conditions"].pop("workers")  # many, and each with its figures
        del engine  # the memory is wanted by the processes that follow
        gc.collect()
        if self.args.device == "cuda":
            torch.cuda.empty_cache()
        say("handler in one process")
        runs, failed = self.run_inprocess(self.args.precision, self.args.batches, processes=1)
        report["handler"] = runs
        report["failed"] = {"handler": failed} if failed else {}
        show(runs, ("batch", "images_per_second", "p50_ms", "p99_ms"))
        report["http"] = self.measure_http(report["failed"])
        return report

    def package(self) -> None:
        """The archive for so many workers, unpacked. Raises SetupError."""
        precision = self.args.precision
        self.options[precision] = self._model_options(precision)
        self.unpack(precision)
        if precision in self.broken:
            raise SetupError(self.broken[precision])

    def check(self, engine: Engine, model_dir: Path) -> dict[str, Any]:
        """Probabilities and decoders against torch and libjpeg on the CPU."""
        say("checking against the CPU")
        transform = self.card.transform
        exact = Settings(device="cpu", engine="torch", precision="fp32")
        reference = load_engine(self.card, model_dir, exact, gpu_id=None, workers=1)
        bodies = [picture.body for picture in self.pictures]
        pixels = [read_picture(body, transform, Settings()).pixels for body in bodies]
        wanted = in_passes(reference, pixels)
        gpu = GpuDecoder(transform, jpeg_decoder(self.device), CpuDecoder(transform))
        decoded = [picture.pixels for picture in decode(gpu, bodies)]
        levels = [
            (one.float() - other.cpu().float()).abs().mean().item()
            for one, other in zip(pixels, decoded, strict=True)
        ]
        chosen, _ = choose_decoder(transform, Settings(), self.device, threads=1)
        found: dict[str, Any] = {
            "images": len(bodies),
            "engine": against(wanted, in_passes(engine, pixels)),
            "engine_and_gpu_decoder": against(wanted, in_passes(engine, decoded)),
            "gpu_decoder_levels": {"mean": sum(levels) / len(levels), "largest": max(levels)},
            "gpu_decoder_drawn_levels": gpu.differences(),
            "decoder_of_auto": chosen.name,
        }
        full = engine.precision == "fp32"
        found["passed"] = (
            found["engine"]["largest_difference"] <= TOLERANCE
            if full
            else found["engine"]["same_best_class"] >= MINIMUM_AGREEMENT
        )
        rows = [{"what": name, **found[name]} for name in ("engine", "engine_and_gpu_decoder")]
        show(rows, ("what", "largest_difference", "same_best_class"), digits=5)
        bar = f"within {TOLERANCE}" if full else f"same best class in {MINIMUM_AGREEMENT:.0%}"
        say(f"{bar}: {'yes' if found['passed'] else 'NO'}")
        if not self.card.weights.trained:
            say("(untrained weights give all classes much the same: this says little)")
        say(f"GPU decoder, levels of 255: {found['gpu_decoder_levels']}; auto: {chosen.name}")
        return found

    def measure_model(self, engine: Engine) -> list[dict[str, Any]]:
        """Pixels in the CPU's memory to probabilities in the CPU's memory."""
        say("the model alone")
        size = self.card.transform.crop_size
        pixels = torch.randint(0, 256, (engine.max_forward, 3, size, size), dtype=torch.uint8)
        rows = []
        for batch in getattr(engine, "sizes", sorted({1, engine.max_forward})):
            images = list(pixels[:batch])
            under_way: deque[Callable[[], Tensor]] = deque()

            def call(images: list[Tensor] = images, under_way: Any = under_way) -> None:
                under_way.append(engine.launch(images))
                if len(under_way) > IN_FLIGHT:
                    under_way.popleft()()

            rows.append({"batch": batch, "images_per_second": batch * self.rate(call)})
            while under_way:
                under_way.popleft()()
        show(rows, ("batch", "images_per_second"))
        return rows

    def measure_decoding(self) -> list[dict[str, Any]]:
        """Encoded bytes to the model's input, header checks and resizing included."""
        say("decoding alone")
        transform, cores = self.card.transform, available_cores()
        bodies = list(islice(cycle(p.body for p in self.pictures), DECODED_TOGETHER))
        decoders: dict[str, Decoder] = {
            "CPU, 1 thread": CpuDecoder(transform),
            f"CPU, {cores} threads": CpuDecoder(transform, cores),
            f"torchvision on {self.device}": GpuDecoder(
                transform, jpeg_decoder(self.device), CpuDecoder(transform)
            ),
        }
        rows = []
        for name, decoder in decoders.items():

            def call(decoder: Decoder = decoder) -> None:
                decode(decoder, bodies)
                if self.device != "cpu":
                    torch.cuda.synchronize()

            rows.append({"decoder": name, "images_per_second": len(bodies) * self.rate(call)})
        show(rows, ("decoder", "images_per_second"))
        return rows

    def rate(self, call: Callable[[], None]) -> float:
        """Calls a second, after a few that are not counted."""
        for _ in range(IN_FLIGHT + 1):
            call()
        calls, begin = 0, time.perf_counter()
        while (now := time.perf_counter()) < begin + self.args.seconds:
            call()
            calls += 1
        return calls / (now - begin)

    def measure_http(self, failed: dict[str, str]) -> list[dict[str, Any]]:
        """Ours and the empty handler, by workers, images in a request and clients."""
        rows: list[dict[str, Any]] = []
        for workers in self.args.workers:
            self.workers = workers
            self.package()
            precision = self.args.precision
            for subject in (ours(self.args.model, precision, self.options[precision]), empty()):
                say(f"{subject.what}, workers: {workers}")
                try:
                    rows += self.measure_server(subject, workers)
                except StartFailed as exc:
                    failed[f"{subject.name}, workers: {workers}"] = str(exc)
                    say(f"  failed: {exc}")
        columns = ("server", "workers", "images", "clients", "images_per_second")
        show(rows, (*columns, "p50_ms", "p99_ms", "refused", "failed"))
        return rows

    def measure_server(self, subject: Subject, workers: int) -> list[dict[str, Any]]:
        rows = []
        self.data["subjects"].setdefault(subject.name, {"failed_starts": []})
        with self.started(subject, Path(sys.executable), self.pictures) as (_, url, _):
            for images in self.args.per_request:
                bodies = requests_of(self.pictures, images)
                for clients in self.args.concurrency:
                    load = Load(
                        concurrency=clients,
                        seconds=self.args.seconds,
                        warmup_seconds=self.args.warmup_seconds,
                    )
                    run = asyncio.run(measure(url, bodies, load, expectations=Expectations()))
                    rows.append(
                        {
                            "server": subject.name,
                            "workers": workers,
                            "images": images,
                            "clients": clients,
                            "images_per_second": images * run.throughput_rps,
                            "p50_ms": run.p50_ms,
                            "p99_ms": run.p99_ms,
                            "refused": run.refused,
                            "failed": run.failed,
                            "failures": run.failures,
                            "generator_cpu_percent": run.generator_cpu_percent,
                        }
                    )
        return rows


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


def decode(decoder: Decoder, bodies: Sequence[bytes]) -> list[Any]:
    """The pictures, in the order of the bodies. Raises the error of the first that has one."""
    started = [decoder.start(open_image(body, Settings())) for body in bodies]
    for decoding in decoder.finish(started):
        if decoding.error:
            raise decoding.error
    return [decoding.picture for decoding in started]


def in_passes(engine: Engine, pixels: Sequence[Tensor]) -> Tensor:
    """Probabilities [N, C] of any number of images, wherever they lie."""
    starts = range(0, len(pixels), engine.max_forward)
    passes = [list(pixels[start : start + engine.max_forward]) for start in starts]
    if engine.device == "cpu":
        passes = [[image.cpu() for image in images] for images in passes]
    return torch.cat([engine.launch(images)() for images in passes])


def against(wanted: Tensor, given: Tensor) -> dict[str, float]:
    same = (wanted.argmax(dim=1) == given.argmax(dim=1)).float().mean().item()
    largest = (wanted - given).abs().max().item()
    return {"largest_difference": largest, "same_best_class": same}


def requests_of(pictures: Sequence[Picture], images: int) -> list[Picture]:
    """Bodies of so many images each: the JPEG itself, or a form with file1, file2, …."""
    if images == 1:
        return list(pictures)
    requests = []
    for start, picture in enumerate(pictures):
        group = islice(cycle(pictures), start, start + images)
        parts = [
            f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file{number}"; '
            f'filename="{number}.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'.encode()
            + one.body
            + b"\r\n"
            for number, one in enumerate(group, start=1)
        ]
        body = b"".join([*parts, f"--{BOUNDARY}--\r\n".encode()])
        requests.append(Picture(picture.name, body, f"multipart/form-data; boundary={BOUNDARY}"))
    return requests


def show(rows: Iterable[Mapping[str, Any]], columns: Sequence[str], digits: int = 1) -> None:
    """A table of some columns."""

    def cell(value: Any) -> str:
        return f"{value:.{digits}f}" if isinstance(value, float) else str(value)

    say("\n".join(table(columns, [[cell(row[name]) for name in columns] for row in rows])) + "\n")


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Images a second from the inside out: the best of each part."""
    bars = {
        "model alone": max(row["images_per_second"] for row in report["model"]),
        **{f"decoding, {row['decoder']}": row["images_per_second"] for row in report["decoding"]},
        "handler": max((row["images_per_second"] for row in report["handler"]), default=0),
    }
    for row in report["http"]:
        name = f"{row['server']}, workers: {row['workers']}, images: {row['images']}"
        bars[name] = max(bars.get(name, 0), row["images_per_second"])

    def fill(axes: Any) -> None:
        axes.barh(range(len(bars)), list(bars.values()))
        axes.set_yticks(range(len(bars)), list(bars))
        axes.invert_yaxis()
        axes.set_xlabel(f"images a second, {report['conditions']['device']}, {report['engine']}")

    draw(path, (9, 1 + 0.3 * len(bars)), fill)


if __name__ == "__main__":
    sys.exit(main())
