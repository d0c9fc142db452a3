"""The commands' parser, and its types: what an option's text may be. Standard library only."""

import argparse
import math
import re
from collections.abc import Callable
from typing import NoReturn

from service.registry.references import DIGEST, NAME, parse_reference

WORKERS = 1, 1024


class Parser(argparse.ArgumentParser):
    """A parser that reports a mistake in one line, not under its whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def number(low: int, high: int) -> Callable[[str], int]:
    """A whole number in a range."""

    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"must be {low} to {high}, got {text!r}")
        return int(text)

    return parse


PORT = number(1, 65535)


def positive(text: str) -> float:
    """A number above 0."""
    if not 0 < (value := _real(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def between(low: float, high: float) -> Callable[[str], float]:
    """A number in a range."""

    def parse(text: str) -> float:
        if not low <= (value := _real(text)) <= high:
            raise argparse.ArgumentTypeError(f"must be {low:g} to {high:g}, got {text!r}")
        return value

    return parse


def share(text: str) -> float:
    """A number from 0 to 1."""
    return between(0, 1)(text)


def _real(text: str) -> float:
    """NaN, which is in no range, for what is no number."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def worker_count(text: str) -> int | None:
    return None if text == "auto" else number(*WORKERS)(text)


def device_ids(text: str) -> tuple[int, ...]:
    ids = text.split(",")
    if not all(word.isascii() and word.isdigit() for word in ids) or len(set(ids)) < len(ids):
        raise argparse.ArgumentTypeError(f"must be numbers like 0,1, each once, got {text!r}")
    return tuple(map(int, ids))


def model_version(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}", text):
        raise argparse.ArgumentTypeError(
            f"must be at most 32 letters, digits, dots, dashes and underscores, got {text!r}"
        )
    return text


def weights(text: str) -> str:
    try:
        parse_reference(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc
    return text


def sha256(text: str) -> str:
    if not re.fullmatch(DIGEST, text):
        raise argparse.ArgumentTypeError(f"must be 64 digits of 0-9 and a-f, got {text!r}")
    return text


def registered_name(text: str) -> str:
    found = re.fullmatch(f"mlflow:({NAME})", text)
    if not found:
        raise argparse.ArgumentTypeError(f"must be mlflow:NAME, got {text!r}")
    return found[1]


def host(text: str) -> str:
    if not text or ":" in text or "/" in text:
        raise argparse.ArgumentTypeError(
            f"must be a host name or an IPv4 address (TorchServe has no IPv6), got {text!r}"
        )
    return text
