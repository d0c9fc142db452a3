"""Load a running server, check every answer, and say how fast it was.

A table for people comes first; the last line is one JSON object.
"""

import argparse
import asyncio
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from service.load.answers import Expectations
from service.load.generator import measure
from service.load.images import as_form, load_images
from service.load.measurement import Load
from service.load.report import heading, make_report, plot_runs, row
from service.options import number, positive


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="./scripts/benchmark", description="Load a running server and check every answer."
    )
    add = parser.add_argument
    add(
        "--url",
        default="http://127.0.0.1:8080",
        help="the server, or a whole URL with a path to send images to (%(default)s)",
    )
    add("--model", default="mobilenet_v2", help="if --url has no path (%(default)s)")
    add("--images", type=Path, metavar="DIR", help="JPEGs to send (default: drawn here)")
    add(
        "--concurrency",
        type=number(1, 10_000),
        nargs="+",
        metavar="N",
        help="closed loop of so many clients, one measurement each (default: 1 8 32)",
    )
    add("--rate", type=positive, nargs="+", metavar="R", help="open loop of R requests a second")
    add("--seconds", type=positive, default=10.0, help="measured (%(default)s)")
    add("--warmup-seconds", type=positive, default=2.0, help="before each (%(default)s)")
    add("--form", choices=["raw", "multipart"], default="raw", help="(%(default)s)")
    add("--header", action="append", default=[], metavar="'NAME: VALUE'", help="repeatable")
    add(
        "--expect",
        type=Path,
        metavar="FILE",
        help="JSON object of file name to top-1 class (default: as each image is answered first)",
    )
    add("--plot", type=Path, metavar="FILE.png", help="throughput against latency")
    args = parser.parse_args(argv)
    if args.concurrency is None and args.rate is None:
        args.concurrency = [1, 8, 32]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    base = args.url.rstrip("/")
    url = base if "/" in base.partition("://")[2] else f"{base}/predictions/{args.model}"
    try:
        headers = dict(re.split(r":\s*", header, maxsplit=1) for header in args.header)
        images = load_images(args.images)
        expected = json.loads(args.expect.read_text("utf-8")) if args.expect else None
    except (OSError, ValueError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    if args.form == "multipart":
        images = [as_form([image]) for image in images]
    expectations = Expectations(expected)
    report = make_report(url, args.form, images)
    times = {"seconds": args.seconds, "warmup_seconds": args.warmup_seconds}
    loads = [Load(concurrency=clients, **times) for clients in args.concurrency or ()]
    loads += [Load(rate=rate, **times) for rate in args.rate or ()]
    print(heading(), flush=True)
    for load in loads:
        measuring = measure(url, images, load, headers=headers, expectations=expectations)
        try:
            report.measurements.append(asyncio.run(measuring))
        except KeyboardInterrupt:
            return 130
        print(row(report.measurements[-1]), flush=True)
    if args.plot:
        plot_runs(report.measurements, args.plot)
    print(json.dumps(asdict(report)))
    return 1 if any(run.failed or not run.ok for run in report.measurements) else 0


if __name__ == "__main__":
    sys.exit(main())
