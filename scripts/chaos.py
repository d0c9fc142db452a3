"""Inject faults into a gateway and two replicas under load, and check what clients saw.

Everything runs on free ports of loopback, in temporary folders, and is ended afterwards. The exit
status is 0 only if every promise was kept, 1 if one was broken.
"""

import random
import signal
import sys
from collections.abc import Sequence
from itertools import islice

from handler.errors import SetupError
from service.chaos.campaign import REPLICAS, Campaign, judge
from service.chaos.options import make_parser
from service.chaos.schedule import make_schedule, read_schedule
from service.processes import on_stop


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser(__doc__).parse_args(argv)
    seed = random.randrange(10**6) if args.seed is None else args.seed  # noqa: S311 no secret
    on_stop(signal.default_int_handler)  # everything is ended
    try:
        if args.replay:
            steps = iter(read_schedule(args.replay))
        else:
            steps = make_schedule(seed, REPLICAS, args.only)
        print(f"seed {seed}", flush=True)
        campaign = Campaign(
            minutes=args.minutes,
            seed=seed,
            steps=islice(steps, args.faults),
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
