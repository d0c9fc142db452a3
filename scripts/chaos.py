"""Inject faults into a gateway and two replicas under load, and check what clients saw.

Everything runs on free ports of loopback, in temporary folders, and is ended afterwards. The exit
status is 0 only if every promise was kept, 1 if one was broken.
"""

import argparse
import random
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from handler.errors import SetupError
from service.chaos.campaign import Campaign, judge
from service.chaos.schedule import KINDS, read_schedule
from service.processes import on_stop


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="./scripts/chaos", description=__doc__, epilog=f"The faults are {', '.join(KINDS)}."
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


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    seed = random.randrange(10**6) if args.seed is None else args.seed  # noqa: S311 no secret
    on_stop(signal.default_int_handler)  # everything is ended
    try:
        steps = read_schedule(args.replay) if args.replay else None
        print(f"seed {seed}", flush=True)
        campaign = Campaign(
            minutes=args.minutes,
            seed=seed,
            steps=steps,
            archive=args.archive and args.archive.resolve(),
            history=args.history,
            prometheus=args.prometheus,
        )
        return 0 if judge(campaign) else 1
    except (SetupError, OSError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
