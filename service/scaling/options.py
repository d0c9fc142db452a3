"""Options of ./scripts/scale."""

import argparse
from collections.abc import Sequence

from service.arguments import Parser, number, positive
from service.options import RANGES

WORKERS, SECONDS = number(*RANGES["workers"]), number(1, 86_400)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="./scripts/scale",
        description="Have more or fewer workers of a running model, or let their number follow "
        "the load (--watch).",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="its name in the server")
    parser.add_argument(
        "workers",
        nargs="?",
        metavar="N|auto",
        type=lambda text: text if text == "auto" else WORKERS(text),
        help="auto: what ./scripts/serve --workers auto gives on this machine and all visible GPUs",
    )
    for name, port in (("--management", 8081), ("--metrics", 8082)):
        url = f"http://127.0.0.1:{port}"
        parser.add_argument(name, metavar="URL", default=url, help="address (default: %(default)s)")
    parser.add_argument("--version", help="of the model (default: its default version)")
    parser.add_argument(
        "--force", action="store_true", help="start more workers even if memory does not suffice"
    )
    parser.add_argument(
        "--timeout",
        metavar="S",
        type=SECONDS,
        default=300,
        help="seconds until all workers are READY (default: %(default)s)",
    )
    group = parser.add_argument_group("autoscaler")
    group.add_argument("--watch", action="store_true", help="let the number follow the load")
    for option, default, kind, text in (
        ("--minimum", 1, WORKERS, "fewest workers"),
        ("--maximum", 8, WORKERS, "most workers"),
        ("--target", 0.7, positive, "capacity ratio above which there are more"),
        ("--cool-down", 60, SECONDS, "quiet seconds until there is one fewer"),
        ("--interval", 5, SECONDS, "seconds between two looks"),
    ):
        group.add_argument(
            option, metavar="N", type=kind, default=default, help=f"{text} (default: %(default)s)"
        )
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; exits with 2 and one line if they are wrong."""
    parser = make_parser()
    args = parser.parse_intermixed_args(argv)  # the number may follow the options
    if args.watch == (args.workers is not None):
        parser.error("give either a number of workers (or auto), or --watch")
    if args.minimum > args.maximum:
        parser.error(f"--minimum is {args.minimum}, more than --maximum, {args.maximum}")
    for name in ("management", "metrics"):
        if not getattr(args, name).startswith(("http://", "https://")):
            parser.error(f"--{name} must be http://HOST:PORT, got {getattr(args, name)!r}")
    return args
