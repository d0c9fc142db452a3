"""Have more or fewer workers of a running model, or let their number follow the load (--watch)."""

import argparse
import sys
from collections.abc import Sequence
from threading import Event

import requests

from handler.errors import SetupError
from service.options import RANGES, number
from service.processes import on_stop
from service.scaling.autoscaler import Autoscaler, Watcher
from service.scaling.memory import headroom_of
from service.scaling.model import Model
from service.scaling.scaling import ScalingFailed, scale
from service.torchserve.management import Management, UnknownModel

WORKERS, SECONDS = number(*RANGES["workers"]), number(1, 86_400)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    management = Management(args.management.rstrip("/"))
    model = Model(management, args.metrics.rstrip("/"), args.model, args.version)
    try:
        if args.watch:
            stop = Event()
            on_stop(lambda *_: stop.set())
            autoscaler = Autoscaler(args.minimum, args.maximum, args.queue_ms, args.cool_down)
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


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; exits with 2 and one line if they are wrong."""
    parser = argparse.ArgumentParser(
        prog="./scripts/scale", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("model", help="its name in the server")
    parser.add_argument(
        "workers",
        nargs="?",
        metavar="N|auto",
        type=lambda text: text if text == "auto" else WORKERS(text),
        help="auto: what ./scripts/serve --workers auto gives on this machine and all visible GPUs",
    )
    address = {"management": "http://127.0.0.1:8081", "metrics": "http://127.0.0.1:8082"}
    for name, url in address.items():
        parser.add_argument(f"--{name}", default=url, help="address (%(default)s)")
    parser.add_argument("--version", help="of the model (the default one)")
    parser.add_argument(
        "--force", action="store_true", help="start more workers even if memory does not suffice"
    )
    parser.add_argument(
        "--timeout",
        metavar="S",
        type=SECONDS,
        default=300,
        help="seconds until all workers are READY (%(default)s)",
    )
    group = parser.add_argument_group("autoscaler")
    group.add_argument("--watch", action="store_true", help="let the number follow the load")
    for option, default, kind, text in (
        ("--minimum", 1, WORKERS, "fewest workers"),
        ("--maximum", 8, WORKERS, "most workers"),
        ("--queue-ms", 50, number(1, 600_000), "mean time in the queue above which there are more"),
        ("--cool-down", 60, SECONDS, "quiet seconds until there is one fewer"),
        ("--interval", 5, SECONDS, "seconds between two looks"),
    ):
        group.add_argument(
            option, metavar="N", type=kind, default=default, help=f"{text} (%(default)s)"
        )
    args = parser.parse_intermixed_args(argv)  # the number may follow the options
    if args.watch == (args.workers is not None):
        parser.error("give either a number of workers (or auto), or --watch")
    if args.minimum > args.maximum:
        parser.error(f"--minimum is {args.minimum}, more than --maximum, {args.maximum}")
    for name in address:
        if not getattr(args, name).startswith(("http://", "https://")):
            parser.error(f"--{name} must be http://HOST:PORT, got {getattr(args, name)!r}")
    return args


if __name__ == "__main__":
    sys.exit(main())
