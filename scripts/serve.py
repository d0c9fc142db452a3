"""Package the models, start TorchServe in the foreground, say when it is ready, stop it cleanly."""

import signal
import sys
import time
from collections.abc import Sequence

from handler.errors import SetupError
from service.gateway.settings import name_ignored
from service.logs import Log, default_form
from service.options import parse_serve
from service.plan import plan_service
from service.processes import on_stop
from service.registry.fetching import fetch
from service.serving import prepare, run


def main(argv: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    options = parse_serve(argv)
    log = Log(options.log_format or default_form())
    on_stop(signal.default_int_handler)  # what is half made is cleaned up
    try:
        name_ignored(log)
        plan = plan_service(*fetch(options))
        server, gateway = prepare(plan, log)
    except SetupError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return run(plan, server, gateway, log, started)


if __name__ == "__main__":
    sys.exit(main())
