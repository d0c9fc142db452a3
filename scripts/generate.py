"""Write handler/configs/metrics.yaml and the tables of the documents, as the code declares them."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

from handler.errors import SetupError
from service.generated import ROOT, outdated

SCRIPTS = Path(__file__).parent


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="./scripts/generate", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing, and exit with 1 if anything is stale"
    )
    args = parser.parse_args(argv)
    try:
        stale = outdated({name: parser_of(name) for name in commands()})
    except SetupError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    for path, text in stale.items():
        name = path.relative_to(ROOT)
        if args.check:
            print(f"{name} is stale: run ./scripts/generate")
        else:
            path.write_text(text, "utf-8")
            print(f"{name} is written")
    return 1 if args.check and stale else 0


def commands() -> list[str]:
    """The commands that have a parser: all but ./scripts/test."""
    return sorted(path.stem for path in SCRIPTS.glob("*.py") if path.with_suffix("").exists())


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser with which a command answers --help."""
    parsers: list[argparse.ArgumentParser] = []
    with (
        patch.object(argparse.ArgumentParser, "print_help", lambda self, *_: parsers.append(self)),
        suppress(SystemExit),
    ):
        import_module(f"scripts.{command}").main(["--help"])
    return parsers[0]


if __name__ == "__main__":
    sys.exit(main())
