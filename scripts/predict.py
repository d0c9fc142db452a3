"""Ask a running server what is in some images: a table for people, --json for machines."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import requests

from service.client import ask, table


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="./scripts/predict",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="where predictions are")
    parser.add_argument("--model", default="mobilenet_v2")
    parser.add_argument("--top-k", type=int, metavar="K", help="classes (default: the server's)")
    parser.add_argument("--json", action="store_true", help="one JSON answer a line, as received")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    url = f"{args.url.rstrip('/')}/predictions/{args.model}"
    failed = 0
    with requests.Session() as session:
        if "127.0.0.1" in url or "localhost" in url:
            session.trust_env = False  # no proxy of the environment
        for path in args.images:
            answer = ask(session, url, path, args.top_k)
            failed += answer["status"] != "success"
            print(json.dumps(answer) if args.json else table(path, answer))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
