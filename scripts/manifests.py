"""Write what helm makes of deploy/kubernetes/chart: kustomize's base and components."""

import argparse
import sys
from collections.abc import Sequence

from handler.errors import SetupError
from service.arguments import Parser
from service.manifests import outdated
from service.stale import settle


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="./scripts/manifests", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing, and exit with 1 if anything is stale"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    try:
        stale = outdated()
    except SetupError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    return settle(stale, "./scripts/manifests", args.check)


if __name__ == "__main__":
    sys.exit(main())
