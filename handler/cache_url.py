"""The address of the shared cache, which may hold a password, so that no message quotes it."""

import re
from urllib.parse import SplitResult, urlsplit

from handler.errors import InvalidSettings


def check_url(url: str) -> None:
    """Raise InvalidSettings unless it is the URL of a Redis. Needs no client."""
    try:
        parts = urlsplit(url)
        fits = {
            "redis": _is_on_network,
            "rediss": _is_on_network,
            "unix": lambda parts: len(parts.path) > 1,
        }[parts.scheme](parts)
    except (KeyError, ValueError):  # the latter from a port that is none
        fits = False
    if not fits:
        raise InvalidSettings(
            "cache_url must be redis://[[USER]:PASSWORD@]HOST[:PORT][/NUMBER], rediss://… for TLS, "
            "or unix:///PATH; special characters of a password are percent-encoded (its value is "
            "not shown here)"
        )


def shown_url(url: str) -> str:
    """A checked URL without user, password and options: for `info` and the log."""
    parts = urlsplit(url)
    return url and f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _is_on_network(parts: SplitResult) -> bool:
    port_is_valid = parts.port is None or parts.port > 0  # raises ValueError
    return bool(parts.hostname) and port_is_valid and bool(re.fullmatch(r"/?\d*", parts.path))
