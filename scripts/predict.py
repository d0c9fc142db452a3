"""Ask a running server what is in some images: a table for people, --json for machines.

With --output it asks about many at once, and writes their answers to a file that can be continued.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from handler.errors import SetupError
from service.arguments import Parser, number, positive
from service.bulk.labelling import FORMATS, Output, label
from service.bulk.sources import SUFFIXES, expand, read
from service.client import Client, error, read_key, table


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="./scripts/predict", description=__doc__)
    add = parser.add_argument
    add(
        "images",
        nargs="+",
        type=Path,
        metavar="IMAGE",
        help="file, folder, 'pattern', .zip, .tar, .tar.gz, or - for a list of paths on stdin",
    )
    where = "where predictions are (default: %(default)s)"
    add("--url", default="http://127.0.0.1:8080", help=where)
    model = "its name (default: %(default)s)"
    add("--model", default="mobilenet_v2", metavar="NAME", help=model)
    add("--top-k", type=int, metavar="K", help="classes (default: the server's)")
    add(
        "--json",
        action="store_true",
        help="one JSON answer a line, as received; with --output, the summary as one line",
    )
    add("--key-file", type=Path, metavar="FILE", help="the gateway's API key (default: none)")
    add("--output", type=Path, metavar="FILE", help="results; continued if it is there")
    add("--format", choices=FORMATS, help="of the output (default: as its suffix says)")
    add("--html", type=Path, metavar="FILE", help="a report with thumbnails, beside the output")
    most = "requests at most, for --output (default: %(default)s)"
    add("--concurrency", type=number(1, 256), default=16, metavar="N", help=most)
    patience = "seconds without any answer until --output gives up (default: %(default)s)"
    add("--patience", type=positive, default=300, metavar="S", help=patience)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.output is None and (args.html or args.format):
        parser.error("--html and --format need --output FILE")
    url = f"{args.url.rstrip('/')}/predictions/{args.model}"
    try:
        key = read_key(args.key_file) if args.key_file else None
        client = Client(url, args.top_k, key, args.concurrency)
        paths = expand(args.images, sys.stdin.buffer)
        if not paths:
            raise SetupError(f"no images: a folder is searched for {' '.join(SUFFIXES)}")
        if args.output is None:
            return show(paths, client, args.json)
        output = Output.named(args.output, args.format, args.html)
        summary = label(paths, client, output, args.concurrency, args.patience)
    except (SetupError, OSError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    facts = summary.as_json()
    print(json.dumps(facts) if args.json else "\n".join(summary.lines()))
    if summary.stopped:
        print(f"stopped: {summary.stopped}; the same command goes on", file=sys.stderr)
        return 130 if summary.stopped == "interrupted" else 1
    return 1 if summary.failed else 0


def show(paths: Sequence[Path], client: Client, as_json: bool) -> int:
    """The answers on stdout, one image after the other."""
    failed = 0
    for image in read(paths):
        if image.problem:
            answer = error(0, *image.problem)
        else:
            answer = client.ask(image.name, image.body).answer
        failed += answer["status"] != "success"
        print(json.dumps(answer) if as_json else table(image.name, answer))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
