"""Play Kubernetes' part with real processes, by the rules of the rendered manifests, under load.

Needs no cluster, but Linux and root, for a hosts file of its own. The exit status is 0 only if no
request failed. A refusal counts as a failure, unless a limit of the manifests explains it (429) or
the day has more load than there are replicas yet (503).
"""

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from handler.errors import SetupError
from service.arguments import Parser, number, positive
from service.processes import on_stop
from service.rehearsal.scenarios import SCENARIOS, Rehearsal
from service.torchserve.config import ROOT

MANIFESTS = ("deploy/kubernetes/base", "deploy/kubernetes/components/hpa")


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="./scripts/rehearse", description=__doc__)
    add = parser.add_argument
    add("scenarios", nargs="+", metavar="SCENARIO", choices=SCENARIOS, help=", ".join(SCENARIOS))
    add(
        "--times",
        type=number(1, 1000),
        default=1,
        metavar="N",
        help="of each scenario but the day (default: %(default)s)",
    )
    add(
        "--minutes",
        type=positive,
        default=20.0,
        metavar="N",
        help="of the day (default: %(default)s)",
    )
    add(
        "--manifests",
        type=Path,
        nargs="+",
        default=[ROOT / path for path in MANIFESTS],
        metavar="FILE|DIR",
        help=f"as rendered; of a folder its *.yaml (default: {' '.join(MANIFESTS)})",
    )
    add(
        "--archive",
        type=Path,
        metavar="FILE.mar",
        help="with the classes red, green and blue (default: made here)",
    )
    add(
        "--dns-seconds",
        type=positive,
        default=30.0,
        metavar="N",
        help="age of an answer of the cluster's DNS; CoreDNS as kubeadm sets it up caches for 30 "
        "(default: %(default)g)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    on_stop(signal.default_int_handler)  # everything is ended
    args.archive = args.archive and args.archive.resolve()
    try:
        return 0 if asyncio.run(Rehearsal(**vars(args)).run()) else 1
    except (SetupError, OSError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
