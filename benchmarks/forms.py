"""What the forms of a request cost, by the number of images in it.

    python -m benchmarks.forms --images DIR

TorchServe runs with a handler that does nothing, so that its own share is left: Java, and the
part of a worker that receives a request. Beside it is what our handler needs to take the request
apart. All is CPU time an image. The forms take turns, because the speed of a machine changes.
Prints a table; the last line is one JSON object.
"""

import argparse
import base64
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import yaml

from benchmarks.images import load_rgb
from benchmarks.servers import Servers, Started, StartFailed, say, show
from benchmarks.subjects import ROOT, empty
from benchmarks.usage import JAVA, WORKER, Meter
from handler.machine import available_cores
from handler.payloads import read_request
from handler.settings import Settings
from service.load.images import ImageRequest, as_form
from service.load.measurement import Load
from service.load.report import machine

CLASSES = 1000  # of the model that would answer
ENGINE = "fp32"  # only a name: there is no model
READ_SECONDS = 0.3
COMPILE_SECONDS = 3.0
OCTETS = "application/octet-stream"
COLUMNS = ("images", "form", "java_ms", "receiving_ms", "reading_ms", "all_ms", "failed")


@dataclass(frozen=True)
class Form:
    """Requests of one form, each with as many images; `row` is what TorchServe makes of the first.

    `row` is None if TorchServe passes the body on as it is.
    """

    requests: Sequence[ImageRequest]
    headers: Mapping[str, str] = field(default_factory=dict)
    row: Mapping[str, Any] | None = None

    def read_us(self, images: int) -> float:
        """Microseconds of CPU time an image, in which our handler takes the request apart."""
        request = self.requests[0]
        headers = {"content-type": request.content_type}
        headers |= {name.lower(): value for name, value in self.headers.items()}
        row = self.row or {"body": bytearray(request.body)}
        settings = Settings(max_images=images)
        calls, begin = 0, time.process_time()
        while (used := time.process_time() - begin) < READ_SECONDS:
            found = read_request(row, headers, CLASSES, settings)
            calls += 1
        if len(found.images) != images:
            raise ValueError(f"{len(found.images)} of {images} images were read")
        return 1e6 * used / calls / images


def forms_of(images: Sequence[ImageRequest], count: int) -> dict[str, Form]:
    """Each form by its name. Raises ValueError if a form cannot be read."""
    groups = [
        list(islice(cycle(images), start, start + count)) for start in range(min(len(images), 16))
    ]
    names = [f"file{number}" for number in range(1, count + 1)]
    parsed = [as_form(group, names) for group in groups]
    mixed = [as_form(group, names, "mixed") for group in groups]
    texts = [[base64.b64encode(image.body).decode() for image in group] for group in groups]
    documents = [
        ImageRequest(group[0].name, json.dumps({"images": encoded}).encode(), "application/json")
        for group, encoded in zip(groups, texts, strict=True)
    ]
    found = {
        "multipart/form-data": Form(
            parsed,
            row={name: bytearray(image.body) for name, image in zip(names, groups[0], strict=True)},
        ),
        "multipart/mixed": Form(mixed),
        "multipart/form-data in X-Body-Type": Form(
            [replace(form, content_type=OCTETS) for form in parsed],
            {"X-Body-Type": parsed[0].content_type},
        ),
        "JSON": Form(documents),
    }
    if count == 1:
        found = {"the image itself": Form([group[0] for group in groups])} | found
    return found


def measure_forms(
    target: Started, images: Sequence[ImageRequest], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each number of images and each form, CPU milliseconds an image."""
    rows = []
    compiling = Load(concurrency=args.clients, seconds=COMPILE_SECONDS)
    target.measure(images, compiling)  # or the first form pays for Java's compilers
    for count in args.per_request:
        forms = forms_of(images, count)
        load = Load(concurrency=args.clients, seconds=args.seconds, warmup_seconds=0.5)
        seconds: dict[str, dict[str, float]] = {name: defaultdict(float) for name in forms}
        answered, failed = dict.fromkeys(forms, 0.0), dict.fromkeys(forms, 0)
        for number in range(args.rounds):
            order = list(forms) if number % 2 == 0 else list(reversed(forms))
            for name in order:
                server = replace(target, headers=forms[name].headers)
                meter = Meter(target.server)
                run = server.measure(forms[name].requests, load, meter)
                requests = run.throughput_rps * run.seconds
                answered[name] += count * requests
                failed[name] += run.failed + run.refused
                for part, ms in meter.ms_per_request(run).items():
                    seconds[name][part.partition(":")[0]] += ms * requests
        for name, form in forms.items():
            done = max(1, answered[name])
            row = {"images": count, "form": name, "failed": failed[name]}
            row |= {"images_per_second": answered[name] / (args.rounds * args.seconds)}
            row |= {"java_ms": seconds[name][JAVA] / done}
            row |= {"receiving_ms": seconds[name][WORKER] / done}
            row |= {"reading_ms": form.read_us(count) / 1000}
            row["all_ms"] = row["java_ms"] + row["receiving_ms"] + row["reading_ms"]
            rows.append(row)
    return rows


def prepare(servers: Servers) -> None:
    """The configuration of the empty handler, as archives have it."""
    folder = servers.model_dir(ENGINE)
    folder.mkdir()
    config = yaml.safe_load((ROOT / "handler" / "configs" / "default.yaml").read_text("utf-8"))
    config |= {"minWorkers": servers.workers, "maxWorkers": servers.workers, "maxBatchDelay": 1}
    (folder / "model-config.yaml").write_text(yaml.safe_dump(config))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.forms",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--images", type=lambda text: Path(text).resolve(), metavar="DIR", help="your JPEGs")
    add("--per-request", type=int, nargs="+", default=[1, 8, 32], metavar="IMAGES")
    add("--clients", type=int, default=4)
    add("--seconds", type=float, default=2, help="of a form in a round")
    add("--rounds", type=int, default=3)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    images = load_rgb(args.images)
    workers = max(1, available_cores() // 2)  # the frontend needs as much
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        servers = Servers(
            folder=Path(folder),
            model="empty",
            weights="untrained",
            recipe=None,
            calibration=None,
            device="cpu",
            precision=ENGINE,
            workers=workers,
            images=args.images,
        )
        prepare(servers)
        try:
            with servers.started(empty(), Path(sys.executable), images[0], []) as target:
                rows = measure_forms(target, images, args)
        except StartFailed as exc:
            print(f"error: {exc}", file=sys.stderr)
            return 1
    size = sum(len(image.body) for image in images) // len(images)
    say(f"{len(images)} images of {size} bytes on average, workers: {workers}")
    say("CPU milliseconds an image: Java; a worker's receiving; our handler's reading; all\n")
    show(rows, COLUMNS, digits=3)
    facts = {"machine": machine(), "image_bytes": size, "workers": workers}
    say(json.dumps({"conditions": facts, "forms": rows}))
    return 1 if any(row["failed"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
