"""Have more or fewer workers of a running model, or let their number follow the load (--watch)."""

import sys
from collections.abc import Sequence
from threading import Event

import requests

from handler.errors import SetupError
from service.processes import on_stop
from service.scaling.autoscaler import Autoscaler, Watcher
from service.scaling.memory import headroom_of
from service.scaling.model import Model
from service.scaling.options import parse
from service.scaling.scaling import ScalingFailed, scale
from service.torchserve.management import Management, UnknownModel


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    management = Management(args.management.rstrip("/"))
    model = Model(management, args.metrics.rstrip("/"), args.model, args.version)
    try:
        if args.watch:
            stop = Event()
            on_stop(lambda *_: stop.set())
            autoscaler = Autoscaler(args.minimum, args.maximum, args.target, args.cool_down)
            Watcher(model, autoscaler, headroom_of, args.interval, stop).run()
        else:
            workers = None if args.workers == "auto" else args.workers
            scale(model, workers, force=args.force, timeout=args.timeout)
    except (ScalingFailed, UnknownModel, SetupError) as exc:
        print(f"error: {exc}", file=sys.stderr)
    except requests.HTTPError as exc:
        answer = " ".join(exc.response.text.split())
        print(f"error: HTTP {exc.response.status_code} of the server: {answer}", file=sys.stderr)
    except requests.RequestException as exc:
        print(f"error: {args.management} does not answer: {type(exc).__name__}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    else:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
