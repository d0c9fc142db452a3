"""Check a server of KServe's V1 and the Open Inference Protocol (V2) with foreign clients.

Each check names what the specification says, and passes, fails, or tests what the server does not
offer. The clients are set up in .venv-conformance/, once. The exit status is 1 if a check fails.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from service.arguments import Parser
from service.tables import text_table
from tests.conformance.checks import FAIL
from tests.conformance.environments import SetupFailed
from tests.conformance.kit import ClientFailed, NoServer, counts, examine, run


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="./scripts/conformance", description=__doc__)
    parser.add_argument("url", help="where the REST protocols are, as in http://127.0.0.1:8080")
    parser.add_argument("model", help="the model's name")
    parser.add_argument(
        "--grpc", metavar="HOST:PORT", help="where V2 over gRPC is (default: not checked)"
    )
    parser.add_argument(
        "--image",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="sent to a model of encoded images; several are possible (default: three drawn ones)",
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    try:
        subject = examine(args.url, args.model, grpc=args.grpc, images=args.image)
        results = list(run(subject))
    except (NoServer, SetupFailed, ClientFailed, OSError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    found = counts(results)
    if args.json:
        print(json.dumps({"counts": found, "results": [asdict(each) for each in results]}))
    else:
        rows = [
            (each.outcome, each.protocol, each.client, each.name, each.states) for each in results
        ]
        headings = ("outcome", "protocol", "client", "check", "what the specification says")
        print("\n".join(text_table(headings, rows, left=range(5))))
        for each in results:
            if each.outcome == FAIL:
                print(f"\n{each.protocol}, {each.name} ({each.client})\n  {each.seen}")
                print(f"  {each.states} {each.source}")
        print("\n" + ", ".join(f"{number} {outcome}" for outcome, number in found.items()))
    return 1 if found[FAIL] else 0


if __name__ == "__main__":
    sys.exit(main())
