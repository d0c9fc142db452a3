"""Compute an answer again, with the archive that gave it, and explain a difference."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from handler.errors import SetupError
from service.arguments import Parser
from service.replay.logged import read_logged
from service.replay.replay import describe, replay
from service.torchserve.config import ServerConfig


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="./scripts/replay",
        description=__doc__,
        epilog="Exit status: 0 the same answer, 1 another one, 2 it cannot be told.",
    )
    parser.add_argument(
        "logged",
        metavar="LOGLINE",
        help="the request's line of the log in JSON, or its answer: text, a file, or - for stdin",
    )
    parser.add_argument("image", type=Path, metavar="IMAGE", help="the file that was sent")
    parser.add_argument(
        "archives",
        type=Path,
        nargs="*",
        metavar="ARCHIVE",
        help="archives, or folders of them, to look in besides the model store; archives that are "
        "given are tried as well",
    )
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    try:
        logged = read_logged(args.logged, args.image.name)
        image = args.image.read_bytes()
        found = replay(logged, image, args.archives, ServerConfig.load().model_store)
    except (OSError, SetupError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(found.as_json(), ensure_ascii=False))
    else:
        print(describe(found))
    return 0 if found.same else 1


if __name__ == "__main__":
    sys.exit(main())
