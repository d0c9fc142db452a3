"""Write what helm makes of deploy/kubernetes/chart: kustomize's base and components."""

import argparse
import sys
from collections.abc import Sequence

from handler.errors import SetupError
from service.arguments import Parser
from service.manifests import ROOT, outdated


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
    for path, text in stale.items():
        name = path.relative_to(ROOT)
        if args.check:
            print(f"{name} is stale: run ./scripts/manifests")
        else:
            path.write_text(text, "utf-8")
            print(f"{name} is written")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
