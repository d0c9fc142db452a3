"""Find the configuration that serves a model fastest on this machine within a latency limit."""

import signal
import sys
from collections.abc import Sequence
from typing import Any

from handler.errors import SetupError
from service.processes import on_stop
from service.tuning.options import parse
from service.tuning.tuning import tune


def interrupt(*_: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ending the server takes a moment
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    model, options = parse(argv)
    on_stop(interrupt)
    try:
        return tune(model, options)
    except (SetupError, OSError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
