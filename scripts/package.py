"""Make model_store/{model}.mar: weights and labels in, a self-contained archive out."""

import signal
import sys
from collections.abc import Sequence

from handler.errors import SetupError
from service.archive.packaging import package_all
from service.options import parse_package
from service.plan import plan_package
from service.processes import on_stop
from service.registry.fetching import fetch
from service.registry.publishing import publish
from service.torchserve.config import ServerConfig


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_package(argv)
    on_stop(signal.default_int_handler)  # what is half made is cleaned up
    try:
        server = ServerConfig.load()
        found, origin = fetch(options)
        plans = [plan_package(name, found, server, origin) for name in found.models]
    except SetupError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    for plan in plans:
        for note in plan.notes:
            print(note, file=sys.stderr)
    status = package_all(plans)
    if status == 0 and options.log_to:
        status = publish(plans[0].archive, options.log_to)
    return status


if __name__ == "__main__":
    sys.exit(main())
