"""Options of ./scripts/chaos."""

import argparse
from pathlib import Path

from service.arguments import Parser
from service.chaos.schedule import KINDS


def make_parser(description: str | None = None) -> argparse.ArgumentParser:
    parser = Parser(
        prog="./scripts/chaos",
        description=description,
        epilog=f"The faults are {', '.join(KINDS)}.",
    )
    add = parser.add_argument
    add(
        "--minutes",
        type=float,
        default=5.0,
        metavar="N",
        help="begin no fault later (default: %(default)s)",
    )
    add("--seed", type=int, metavar="S", help="decides the schedule (default: a random one)")
    add(
        "--only",
        choices=KINDS,
        metavar="FAULT",
        action="append",
        help="inject no other faults; may be given several times",
    )
    add("--faults", type=int, metavar="N", help="end after so many (default: by the time alone)")
    add(
        "--replay",
        type=Path,
        metavar="FILE",
        help="the faults of a history, in place of a seed's; an empty file has none",
    )
    add("--archive", type=Path, metavar="FILE.mar", help="(default: a small model made here)")
    add(
        "--history",
        type=Path,
        metavar="FILE",
        help="write every request and fault, a JSON line each",
    )
    add(
        "--prometheus",
        action="store_true",
        help="run Prometheus beside it: each fault must raise its alert",
    )
    return parser
