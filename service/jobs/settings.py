"""The settings of jobs, which are a part of the gateway's, and the addresses that they admit."""

import base64
import binascii
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from handler.errors import InvalidSettings
from handler.rules import setting

PREFIX = "GATEWAY_JOBS_"
# Strict, so that whoever parses an address after us finds the same parts in it.
URL = re.compile(
    r"(https?)://([A-Za-z0-9][A-Za-z0-9.-]{0,252})(?::([0-9]{1,5}))?"
    r"(/[A-Za-z0-9._~!$&'()*+,;=:@%/-]*)(\?[A-Za-z0-9._~!$&'()*+,;=:@%/?-]*)?"
)
MAX_URL = 2048  # characters


@dataclass(frozen=True, kw_only=True)
class JobsSettings:
    """The settings of jobs. A value that breaks its rule raises InvalidSettings."""

    jobs_url: str = setting(
        "", "Redis that keeps the jobs, `redis://HOST:PORT/DB`; empty: there are no jobs"
    )
    jobs_folder: str = setting("jobs", "folder on a disk for the images of unfinished jobs")
    jobs_folder_bytes: int = setting(
        10 * 2**30, "bytes in it from which no new job is taken", low=1, high=2**50
    )
    jobs_max_bytes: int = setting(
        2**30, "bytes of a job's body, and of its images unpacked", low=1, high=2**40
    )
    jobs_max_images: int = setting(10_000, "images of a job", low=1, high=1_000_000)
    jobs_max_open: int = setting(100, "unfinished jobs, of all clients", low=1, high=10_000)
    jobs_max_open_per_client: int = setting(
        10, "unfinished jobs, of one client", low=1, high=10_000
    )
    jobs_concurrency: int = setting(
        1, "images of all jobs that are classified at the same time", low=1, high=256
    )
    jobs_yield_at: int = setting(
        4,
        "requests of others in progress at which jobs wait",
        low=1,
        high=100_000,
    )
    jobs_body_seconds: int = setting(600, "for a whole body of a job", low=1, high=86_400)
    jobs_max_age_seconds: int = setting(
        86_400, "after which an unfinished job is given up", low=1, high=30 * 86_400
    )
    jobs_keep_seconds: int = setting(
        86_400, "for which a finished job keeps its results", low=60, high=30 * 86_400
    )
    jobs_sources: str = setting(
        "",
        "what URLs of images must begin with, `https://HOST/PATH/,…`; empty: no URL is fetched",
    )
    jobs_webhooks: str = setting("", "likewise the URLs of webhooks; empty: none is called")
    jobs_webhook_secret: str = setting(
        "", "file with the key that signs webhooks, `whsec_` and base64 of 24 to 64 bytes"
    )
    jobs_private_addresses: bool = setting(
        False, "whether those hosts may have addresses that are not public"
    )

    def check_jobs(self) -> None:
        """Raises InvalidSettings."""
        if self.jobs_url and not re.fullmatch(r"(redis|rediss|unix)://\S+", self.jobs_url):
            raise InvalidSettings(f"{PREFIX}URL must be redis://HOST:PORT/DB")  # it has a password
        for name in ("jobs_sources", "jobs_webhooks"):
            self.prefixes(name)
        if self.jobs_webhooks:
            if not self.jobs_webhook_secret:
                raise InvalidSettings(f"{PREFIX}WEBHOOKS needs {PREFIX}WEBHOOK_SECRET=FILE")
            self.webhook_key()

    def prefixes(self, name: str) -> tuple["Address", ...]:
        """`jobs_sources` or `jobs_webhooks`. Raises InvalidSettings."""
        text = getattr(self, name)
        entries = [entry.strip() for entry in text.split(",")] if text else []
        found = tuple(address for entry in entries if (address := Address.parse(entry)))
        if len(found) < len(entries) or any(not each.is_prefix for each in found):
            raise InvalidSettings(
                f"GATEWAY_{name.upper()} must be addresses that end in /, https://HOST/PATH/,…, "
                f"got {text!r}"
            )
        return found

    def webhook_key(self) -> bytes:
        """What signs. Raises InvalidSettings."""
        name = f"{PREFIX}WEBHOOK_SECRET"
        try:
            text = Path(self.jobs_webhook_secret).read_text("ascii").strip()
            key = base64.b64decode(text.removeprefix("whsec_"), validate=True)
        except (OSError, UnicodeDecodeError, binascii.Error) as exc:
            raise InvalidSettings(
                f"{name} must be a file with whsec_ and base64, got {self.jobs_webhook_secret!r}: "
                f"{type(exc).__name__}"
            ) from None
        if not text.startswith("whsec_") or not 24 <= len(key) <= 64:
            raise InvalidSettings(f"{name} must have whsec_ and base64 of 24 to 64 bytes")
        return key


@dataclass(frozen=True)
class Address:
    """An absolute URL in parts, or what URLs must begin with."""

    scheme: str
    host: str
    port: int
    path: str
    query: str

    @classmethod
    def parse(cls, text: str) -> "Address | None":
        """None if the text is no URL that we take: none with a user, a fragment or dots in it."""
        match = URL.fullmatch(text) if len(text) <= MAX_URL else None
        if not match:
            return None
        scheme, host, port, path, query = match.groups()
        number = int(port) if port else {"http": 80, "https": 443}[scheme]
        plain = unquote(path)
        # What a server takes for a way up, or for the end of a part, would leave the prefix.
        if number > 65535 or re.search(r"(^|/)\.{1,2}(/|;|$)|[\\\x00-\x1f]|%", plain):
            return None
        if plain.count("/") != path.count("/"):
            return None
        return cls(scheme, host.lower(), number, path, query or "")

    @property
    def is_prefix(self) -> bool:
        return self.path.endswith("/") and not self.query

    def begins_with(self, prefix: "Address") -> bool:
        ours = (self.scheme, self.host, self.port)
        return ours == (prefix.scheme, prefix.host, prefix.port) and self.path.startswith(
            prefix.path
        )


def admits(prefixes: tuple[Address, ...], url: str) -> bool:
    """Whether a URL begins as one of them does."""
    address = Address.parse(url)
    return address is not None and any(address.begins_with(prefix) for prefix in prefixes)
