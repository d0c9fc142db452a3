"""The address of the shared cache, which may hold a password, so that no message quotes it."""

import re
from urllib.parse import SplitResult, urlsplit

from handler.errors import InvalidSettings


def check_url(url: str, name: str = "cache_url") -> None:
    """Raise InvalidSettings unless it is the URL of a Redis. Needs no client."""
    try:
        fits = _fits(urlsplit(url))
    except ValueError:  # from a port that is none
        fits = False
    if not fits:
        raise InvalidSettings(
            f"{name} must be redis://[[USER]:PASSWORD@]HOST[:PORT][/NUMBER], rediss://… for TLS, "
            "or unix:///PATH; special characters of a password are percent-encoded (its value is "
            "not shown here)"
        )


def shown_url(url: str) -> str:
    """A checked URL without user, password and options: for the log."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _fits(parts: SplitResult) -> bool:
    if parts.scheme == "unix":
        return len(parts.path) > 1
    host_and_port = bool(parts.hostname) and parts.port != 0  # which may raise ValueError
    number = re.fullmatch(r"/?\d*", parts.path) is not None
    return parts.scheme in ("redis", "rediss") and host_and_port and number
