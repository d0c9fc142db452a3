"""Measure how often a model is right, on labelled images: a running service or an archive.

The exit status is 1 if --min-top1 is not reached, and 2 if nothing could be measured.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from handler.errors import SetupError
from handler.fields import LEVELS
from service.arguments import Parser, between, number, positive, share
from service.client import read_key
from service.evaluation.evaluation import evaluate
from service.evaluation.figures import Figures
from service.evaluation.report import lines, percent, write_report
from service.evaluation.targets import Asking


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="./scripts/evaluate", description=__doc__)
    add = parser.add_argument
    add(
        "images",
        type=Path,
        metavar="IMAGES",
        help="folder with a folder for each class or labels.csv; or a .csv or .jsonl with file, "
        "and class_id or label",
    )
    where = "where predictions are (default: %(default)s)"
    add("--url", default="http://127.0.0.1:8080", help=where)
    add("--archive", metavar="FILE.mar", help="measured in this process, in place of --url")
    add("--against", metavar="URL|FILE.mar", help="measured as well, and compared (default: none)")
    model = "for a URL without a path (default: %(default)s)"
    add("--model", default="mobilenet_v2", metavar="NAME", help=model)
    add(
        "--set",
        type=between(*LEVELS),
        metavar="LEVEL",
        help="ask for sets that hold the class so often",
    )
    add("--unknown", action="store_true", help="ask whether images are unlike all that is known")
    add("--min-top1", type=share, metavar="SHARE", help="exit status 1 if top-1 is less than this")
    add(
        "--without-failed",
        action="store_true",
        help="leave failed images out (default: they count as wrong)",
    )
    add("--json", action="store_true", help="the figures as one line")
    add("--html", type=Path, metavar="FILE", help="a report with thumbnails")
    add("--key-file", type=Path, metavar="FILE", help="the gateway's API key (default: none)")
    most = "requests at most (default: %(default)s)"
    add("--concurrency", type=number(1, 256), default=16, metavar="N", help=most)
    patience = "seconds without any answer until it gives up (default: %(default)s)"
    add("--patience", type=positive, default=300, metavar="S", help=patience)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    options = {"set": str(args.set)} if args.set is not None else {}
    options |= {"unknown": "true"} if args.unknown else {}
    targets = [args.archive or args.url, *([args.against] if args.against else [])]
    try:
        key = read_key(args.key_file) if args.key_file else None
        asking = Asking(
            options=options, key=key, concurrency=args.concurrency, patience=args.patience
        )
        report, runs = evaluate(
            args.images, targets, args.model, asking, without_failed=args.without_failed
        )
        if args.html:
            write_report(report, runs, args.html)
    except (SetupError, OSError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(json.dumps(asdict(report)) if args.json else "\n".join(lines(report)))
    return 0 if args.min_top1 is None else judge(report.a, args.min_top1)


def judge(figures: Figures, bound: float) -> int:
    """The exit status: the share that was measured is held against the bound, not its interval."""
    is_enough = figures.top1.share >= bound
    word = "reaches" if is_enough else "is below"
    print(f"top-1 {percent(figures.top1)} {word} {bound:g}", file=sys.stderr)
    return 0 if is_enough else 1


if __name__ == "__main__":
    sys.exit(main())
