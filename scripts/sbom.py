"""Print a bill of materials (CycloneDX, JSON): of this installation, or of an archive."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from handler.errors import SetupError
from service.arguments import Parser
from service.sbom import sbom_of_archive, sbom_of_installation


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="./scripts/sbom", description=__doc__)
    parser.add_argument(
        "archive", type=Path, nargs="?", metavar="ARCHIVE", help="(default: this installation)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    try:
        document = sbom_of_archive(args.archive) if args.archive else sbom_of_installation()
    except SetupError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    print(json.dumps(document, indent=1, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
