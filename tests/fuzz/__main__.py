"""The command: each target in a process of its own, then a table of what was done and found."""

import argparse
import sys

from tests.fuzz.running import describe, run
from tests.fuzz.target import NAMES


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--executions", type=int, default=10_000, help="of each target")
    parser.add_argument("--seconds", type=int, default=0, help="for each target; 0: no limit")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    if unknown := set(args.targets) - {*NAMES}:
        parser.error(f"no target {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    results = []
    for name in args.targets or NAMES:
        results.append(run(name, args.executions, args.seconds, args.seed))
        print(describe(results[-1:], head=len(results) == 1), flush=True)
    print(f"{sum(result.executions for result in results)} executions", flush=True)
    for result in results:
        for path in result.findings:
            print(f"\n{result.name}: {path}\n{result.text(path)}", file=sys.stderr)
    return 1 if any(result.findings for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
