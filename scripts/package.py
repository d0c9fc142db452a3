"""Make model_store/{model}.mar: weights and labels in, a self-contained archive out."""

import sys
from collections.abc import Sequence

from handler.errors import SetupError
from service.archive.packaging import package_all
from service.options import parse_package
from service.plan import plan_package
from service.torchserve.config import ServerConfig


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_package(argv)
    try:
        server = ServerConfig.load()
        plans = [plan_package(name, options, server) for name in options.models]
    except SetupError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    for plan in plans:
        for note in plan.notes:
            print(note, file=sys.stderr)
    return package_all(plans)


if __name__ == "__main__":
    sys.exit(main())
