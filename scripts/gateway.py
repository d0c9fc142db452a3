"""Run nginx in front of TorchServe: POST /predict, GET /health, GET /info, keys, limits, retries.

Settings are environment variables GATEWAY_…, listed in docs/gateway.md.
"""

import argparse
import hashlib
import secrets
import sys
from collections.abc import Sequence
from threading import Event

from handler.errors import SetupError
from service.arguments import Parser
from service.gateway.process import POLL_SECONDS, Gateway, GatewayEnded
from service.gateway.settings import NAME, GatewaySettings, name_ignored
from service.logs import Log, default_form
from service.processes import on_stop


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="./scripts/gateway", description=__doc__)
    parser.add_argument(
        "--new-key", metavar="NAME", help="print a new key of a client and its line for the file"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    if args.new_key is not None:
        return new_key(args.new_key)
    stop = Event()
    on_stop(lambda *_: stop.set())
    gateway = None
    log = Log(default_form())
    name_ignored(log)
    try:
        settings = GatewaySettings.load()
        gateway = Gateway(settings, log)
        gateway.start()
        print(f"Gateway on {settings.url}", file=sys.stderr, flush=True)
        while not stop.wait(POLL_SECONDS):
            gateway.check()
    except SetupError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    except GatewayEnded as exc:
        print(f"error: {exc}; the cause is in the log above", file=sys.stderr)
        return 1
    finally:
        if gateway:
            gateway.stop()
    return 0


def new_key(name: str) -> int:
    """Print a key, which is stored nowhere, and its line for the keys file."""
    if not NAME.fullmatch(name):
        print(f"error: a client's name must match {NAME.pattern}, got {name!r}", file=sys.stderr)
        return 2
    key = secrets.token_urlsafe(32)
    print(f"key, for the client: {key}")
    print(f"line for the file:   {name} {hashlib.sha256(key.encode()).hexdigest()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
