"""Write handler/configs/metrics.yaml, the tables of the documents and the messages of gRPC.

They are made from what the code and the .proto declare.
"""

import argparse
import sys
from collections.abc import Sequence

import service.chaos.options
import service.load.options
import service.rollout.options
import service.scaling.options
import service.tuning.options
from handler.errors import SetupError
from scripts import (
    conformance,
    evaluate,
    gateway,
    healthcheck,
    manifests,
    predict,
    rehearse,
    replay,
    sbom,
)
from service.arguments import Parser
from service.generated import outdated
from service.openinference import compiled
from service.options import package_parser, serve_parser
from service.stale import settle


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="./scripts/generate", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing, and exit with 1 if anything is stale"
    )
    return parser


PARSERS = {
    "serve": serve_parser,
    "package": package_parser,
    "predict": predict.make_parser,
    "evaluate": evaluate.make_parser,
    "scale": service.scaling.options.make_parser,
    "tune": service.tuning.options.make_parser,
    "rollout": service.rollout.options.make_parser,
    "benchmark": service.load.options.make_parser,
    "healthcheck": healthcheck.make_parser,
    "gateway": gateway.make_parser,
    "chaos": service.chaos.options.make_parser,
    "rehearse": rehearse.make_parser,
    "replay": replay.make_parser,
    "sbom": sbom.make_parser,
    "conformance": conformance.make_parser,
    "manifests": manifests.make_parser,
    "generate": make_parser,
}


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    try:
        stale = outdated({name: make() for name, make in PARSERS.items()}) | compiled.outdated()
    except SetupError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    return settle(stale, "./scripts/generate", args.check)


if __name__ == "__main__":
    sys.exit(main())
