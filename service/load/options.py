"""Options of ./scripts/benchmark."""

import argparse
from pathlib import Path

from service.arguments import Parser, number, positive


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="./scripts/benchmark", description="Load a running server and check every answer."
    )
    add = parser.add_argument
    add(
        "--url",
        default="http://127.0.0.1:8080",
        help="the server, or a whole URL with a path to send images to (default: %(default)s)",
    )
    model = "if --url has no path (default: %(default)s)"
    add("--model", default="mobilenet_v2", metavar="NAME", help=model)
    add("--images", type=Path, metavar="DIR", help="JPEGs to send (default: drawn here)")
    add(
        "--concurrency",
        type=number(1, 10_000),
        nargs="+",
        metavar="N",
        help="closed loop of so many clients, one measurement each (default: 1 8 32)",
    )
    add("--rate", type=positive, nargs="+", metavar="R", help="open loop of R requests a second")
    seconds = "measured (default: %(default)s)"
    add("--seconds", type=positive, default=10.0, metavar="S", help=seconds)
    warmup = "before each (default: %(default)s)"
    add("--warmup-seconds", type=positive, default=2.0, metavar="S", help=warmup)
    add(
        "--per-request",
        type=number(1, 1024),
        default=1,
        metavar="IMAGES",
        help="in each request; several go as multipart/mixed (default: %(default)s)",
    )
    add(
        "--form",
        choices=["raw", "multipart"],
        default="raw",
        help="multipart is multipart/form-data, which browsers send (default: %(default)s)",
    )
    add("--key-file", type=Path, metavar="FILE", help="the gateway's API key (default: none)")
    add("--header", action="append", default=[], metavar="'NAME: VALUE'", help="repeatable")
    add(
        "--expect",
        type=Path,
        metavar="FILE",
        help="JSON object of file name to top-1 class (default: as each image is answered first)",
    )
    add("--plot", type=Path, metavar="FILE.png", help="throughput against latency")
    return parser
