"""Have more or fewer workers of a running model, or let their number follow the load (--watch).

The exit status is 1 if the model has another number than was asked for, and 2 if none could be
asked for.
"""

import sys
from collections.abc import Sequence
from threading import Event

import requests

from handler.errors import SetupError
from service.client import no_answer
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
    except ScalingFailed as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1
    except UnknownModel as exc:
        print(f"error: {exc}{others(model)}", file=sys.stderr)
    except SetupError as exc:
        print(f"error: {exc}", file=sys.stderr)
    except requests.HTTPError as exc:
        answer = " ".join(exc.response.text.split())
        print(f"error: HTTP {exc.response.status_code} of the server: {answer}", file=sys.stderr)
    except requests.RequestException as exc:
        print(f"error: {no_answer(management.url, exc)}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    else:
        return 0
    return 2


def others(model: Model) -> str:
    """What the server has in place of a model that it does not have, as far as it says."""
    try:
        names = model.management.models()
        if model.name in names:
            versions = model.management.versions(model.name)
            names = [f"{model.name}/{version}" for version in versions]
    except (requests.RequestException, UnknownModel):
        return ""
    return f"; it has {', '.join(names) or 'none'}"


if __name__ == "__main__":
    sys.exit(main())
