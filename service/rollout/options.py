"""Options of ./scripts/rollout."""

import argparse
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from service.arguments import Parser, number, positive, share

ABOUT = (
    "Put a new version of a model in the place of the old one step by step, and put everything "
    "back by itself if it is worse. GATEWAY_ROLLOUT names the file that the gateway reads."
)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser("./scripts/rollout", description=ABOUT, allow_abbrev=False)
    parser.add_argument("archive", nargs="?", type=Path, metavar="NEW.mar", help="the new version")
    parser.add_argument(
        "--status", action="store_true", help="what the last rollout is doing, or has done"
    )
    parser.add_argument(
        "--abort", action="store_true", help="put everything back, as Ctrl-C does in its terminal"
    )
    parser.add_argument("--json", action="store_true", help="the record as JSON, at the end")
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="images that both versions are asked about first"
    )
    parser.add_argument(
        "--allow-new-classes",
        action="store_true",
        help="the new version may have other classes than the old one",
    )
    parser.add_argument("--require-signed", metavar="PUBLIC.pem|off", help="as of ./scripts/serve")
    parser.add_argument(
        "--keep-old", action="store_true", help="leave the old version registered at the end"
    )
    default: float
    group = parser.add_argument_group("steps")
    group.add_argument(
        "--steps",
        type=_steps,
        default="1,5,25,50,100",
        metavar="P,…",
        help="percent of the requests for the new version, at last 100 (default: %(default)s)",
    )
    for option, default, kind, text in (
        ("--shadow", 10, number(0, 100), "percent of the requests that are asked of both versions"),
        ("--step-seconds", 60, positive, "seconds that a step takes at least"),
        ("--step-requests", 100, number(1, 10**9), "requests that a step needs at least"),
        ("--timeout", 3600, positive, "seconds within which a step must have seen them"),
    ):
        _add(group, option, default, kind, text)
    group = parser.add_argument_group("bounds")
    for option, default, kind, text in (
        ("--max-errors", 0.01, share, "share of the requests that may fail beyond the old's"),
        ("--max-slowdown", 1.5, positive, "times as long as the old version it may take"),
        ("--max-disagreement", 0.2, share, "share of the answers with another best class"),
    ):
        _add(group, option, default, kind, text)
    return parser


def _add(
    group: argparse._ArgumentGroup,
    option: str,
    default: float,
    kind: Callable[[str], Any],
    text: str,
) -> None:
    group.add_argument(
        option, metavar="N", type=kind, default=default, help=f"{text} (default: %(default)s)"
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; exits with 2 and one line if they are wrong."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if bool(args.archive) + args.status + args.abort != 1:
        parser.error("give a new archive, --status or --abort")
    return args


def _steps(text: str) -> tuple[float, ...]:
    try:
        steps = tuple(map(float, text.split(",")))
    except ValueError:
        steps = ()
    rising = all(a < b for a, b in pairwise(steps))
    if not steps or not rising or steps[0] <= 0 or steps[-1] != 100 or len(steps) > 100:
        raise argparse.ArgumentTypeError(f"must be rising percents that end with 100, got {text!r}")
    return steps
