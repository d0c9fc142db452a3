"""Exit 0 only if each version of each model has all its workers READY and answers a prediction.

For containers and load balancers. TorchServe's own /ping says Healthy while models load, while
workers crash, and without any model; its workers say READY while every prediction fails.
"""

import argparse
import sys
from collections.abc import Sequence

from service.arguments import Parser
from service.health import check_gateway, check_models


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="./scripts/healthcheck", description=__doc__)
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="NAME, which is its default version, or NAME/VERSION (default: every version of every "
        "registered model, at least one)",
    )
    for name, port in (("management", 8081), ("predictions", 8080)):
        parser.add_argument(
            f"--{name}",
            metavar="URL",
            default=f"http://127.0.0.1:{port}",
            help=f"{name} address (default: %(default)s)",
        )
    parser.add_argument(
        "--gateway",
        action="store_true",
        help="ask the gateway that the GATEWAY_ variables describe for its /health instead",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    if args.gateway:
        healthy, message = check_gateway()
    else:
        healthy, message = check_models(args.management, args.predictions, args.models)
    print(message)
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main())
