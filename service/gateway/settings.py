"""The settings and keys of the gateway, checked so that nothing in them can be nginx's syntax."""

import ipaddress
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from handler.environment import platform_variables
from handler.errors import InvalidSettings, SetupError
from handler.rules import check, from_environment, setting
from handler.settings import PREFIX as HANDLER_PREFIX
from service.jobs.settings import JobsSettings
from service.logs import Log

PREFIX = "GATEWAY_"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")  # of a model, or a client
VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}")
SHA256 = re.compile(r"[0-9a-f]{64}")
MAX_CLIENTS = 10_000  # in a keys file; nginx takes what they are told in, up to 4 MB


@dataclass(frozen=True)
class Client:
    """A line of the keys file."""

    name: str
    sha256: str  # of the key, in hex
    disabled: bool = False


@dataclass(frozen=True, kw_only=True)
class GatewaySettings(JobsSettings):
    """The settings of one gateway, those of jobs included.

    A value that breaks its rule raises InvalidSettings.
    """

    host: str = setting("127.0.0.1", "an address of this machine; `0.0.0.0` for all")
    port: int = setting(8000, "port of the gateway", low=1, high=65535)
    grpc_port: int = setting(
        0, "port of the Open Inference Protocol over gRPC; 0: it is not served", low=0, high=65535
    )
    upstreams: str = setting(
        "127.0.0.1:8080",
        "TorchServe's predictions, `HOST:PORT,…`; a name stands for all its IPv4 addresses, looked "
        "up every 5 s",
    )
    management: str = setting(
        "127.0.0.1:8081", "their management addresses, for `/health` and `/info`"
    )
    models: str = setting(
        "mobilenet_v2",
        "names separated by commas; the first answers `/predict`, and `/health` needs all",
    )
    split: str = setting(
        "",
        "versions of the first model and their share of the clients in percent: `1.0=90,2.0=10`; "
        "empty: its default version",
    )
    keys: str = setting(
        "", "the keys file, or `off`; empty: off on loopback, and an error on other addresses"
    )
    rollout: str = setting(
        "",
        "the file in which `./scripts/rollout` says what share of the requests a new version gets; "
        "empty: no rollouts",
    )
    tls_certificate: str = setting("", "PEM file with the certificate and its chain")
    tls_key: str = setting("", "PEM file with its key")
    rate: int = setting(200, "requests a second of one client; 0: no limit", low=0, high=1_000_000)
    burst: int = setting(
        400, "requests by which a client may exceed its rate for a moment", low=0, high=1_000_000
    )
    max_concurrent: int = setting(
        256,
        "requests in progress, of all clients; those whose bodies are still arriving do not count",
        low=1,
        high=100_000,
    )
    max_concurrent_per_client: int = setting(
        64, "requests in progress, of one client", low=1, high=100_000
    )
    max_body_bytes: int = setting(
        16 * 2**20,
        "bytes of a request's body; not above `max_request_size` in `config.properties`",
        low=1,
        high=2**30,
    )
    client_timeout_seconds: int = setting(
        10, "for a request's headers, and between two pieces of its body", low=1, high=3600
    )
    body_timeout_seconds: int = setting(60, "for a whole body", low=1, high=3600)
    response_timeout_seconds: int = setting(
        60,
        "for TorchServe's answer; with several replicas, a second try included",
        low=1,
        high=3600,
    )
    feedback_requests: int = setting(
        0,
        "answers that are remembered, so that `POST /feedback` can judge them, in 256 bytes each; "
        "0: no feedback",
        low=0,
        high=10_000_000,
    )
    metrics_allow: str = setting("127.0.0.1,::1", "addresses or networks that may read `/metrics`")
    trusted_proxies: str = setting(
        "",
        "addresses or networks of load balancers, whose `X-Forwarded-For` says who the client is; "
        "empty: nobody's does",
    )

    def __post_init__(self) -> None:
        check(self, _variable)
        if not _is_address(self.host):
            raise _invalid("host", "must be an IP address", self.host)
        for name in ("upstreams", "management"):
            for entry in _entries(name, getattr(self, name)):
                _split_address(name, entry)
        for model in self.model_names:
            if not NAME.fullmatch(model):
                raise _invalid("models", "must be names separated by commas", self.models)
        self.weights()
        if self.split and self.rollout:
            raise InvalidSettings(f"{PREFIX}SPLIT and {PREFIX}ROLLOUT both divide the requests")
        self.check_jobs()
        self.networks("metrics_allow")
        if self.trusted_proxies:
            self.networks("trusted_proxies")
        if bool(self.tls_certificate) != bool(self.tls_key):
            raise InvalidSettings(
                f"{PREFIX}TLS_CERTIFICATE and {PREFIX}TLS_KEY go together, and one is missing"
            )
        for name in ("tls_certificate", "tls_key"):
            if path := getattr(self, name):
                _check_file(name, path)
        if self.keys not in ("", "off"):
            _check_file("keys", self.keys)
        elif not self.keys and not self.on_loopback:
            raise InvalidSettings(
                f"{PREFIX}HOST is {self.host}, which other machines may reach: give "
                f"{PREFIX}KEYS=FILE (./scripts/gateway --new-key NAME makes a line of it), "
                f"or {PREFIX}KEYS=off"
            )

    @classmethod
    def load(cls, environ: Mapping[str, str] = os.environ) -> "GatewaySettings":
        """Settings from the environment. Raises InvalidSettings: the name, the rule, the value."""
        return cls(**from_environment(cls, PREFIX, environ))

    @property
    def on_loopback(self) -> bool:
        return ipaddress.ip_address(self.host).is_loopback

    @property
    def keys_file(self) -> Path | None:
        return None if self.keys in ("", "off") else Path(self.keys).resolve()

    @property
    def rollout_file(self) -> Path | None:
        return Path(self.rollout).resolve() if self.rollout else None

    @property
    def model_names(self) -> list[str]:
        return _entries("models", self.models)

    @property
    def local_host(self) -> str:
        """The gateway's address for a client on this machine, as it stands before a port."""
        return bracketed({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host))  # noqa: S104

    @property
    def url(self) -> str:
        """The gateway for a client on this machine."""
        scheme = "https" if self.tls_certificate else "http"
        return f"{scheme}://{self.local_host}:{self.port}"

    def weights(self) -> dict[str, int]:
        """Version -> percent of the clients; empty without a split."""
        if not self.split:
            return {}
        weights: dict[str, int] = {}
        for entry in _entries("split", self.split):
            version, _, percent = entry.partition("=")
            if not VERSION.fullmatch(version) or version in weights:
                raise _invalid("split", "must be VERSION=PERCENT,…", self.split)
            if not re.fullmatch("[0-9]{1,3}", percent):
                raise _invalid("split", "must have whole percents", self.split)
            weights[version] = int(percent)
        if sum(weights.values()) != 100:
            raise _invalid("split", "must add up to 100 percent", self.split)
        return weights

    def networks(self, name: str) -> list[str]:
        """`metrics_allow` or `trusted_proxies` as networks in CIDR form."""
        text = getattr(self, name)
        try:
            return [str(ipaddress.ip_network(entry)) for entry in _entries(name, text)]
        except ValueError:
            raise _invalid(name, "must be addresses or networks", text) from None

    def addresses(self, name: str) -> tuple[str, ...]:
        """`upstreams` or `management` as IP:PORT, all that a name stands for, in order.

        Resolved here and not by nginx, which tells replicas apart by their addresses. Raises
        SetupError.
        """
        found: set[str] = set()
        for entry in _entries(name, getattr(self, name)):
            host, port = _split_address(name, entry)
            try:
                answers = socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM)
            except OSError as exc:
                raise SetupError(f"{PREFIX}{name.upper()}: {host} is not found: {exc}") from exc
            found |= {f"{address[0]}:{port}" for *_, address in answers}
        return tuple(sorted(found))


def name_ignored(log: Log, environ: Mapping[str, str] = os.environ) -> None:
    """Say once, at the start, which variables look like settings of ours and are the platform's."""
    if names := sorted(platform_variables(environ, HANDLER_PREFIX, PREFIX)):
        message = f"{', '.join(names)}: made by Kubernetes or Docker for a service of that name"
        log.event("INFO", "ignored", message=message)


def read_keys(path: Path) -> list[Client]:
    """The clients in a keys file: `NAME SHA256 [disabled]` a line, # begins a comment.

    Raises InvalidSettings with the line's number; the line itself, which may hold a key by mistake,
    is not shown.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise InvalidSettings(f"{path} cannot be read: {exc}") from exc
    clients: list[Client] = []
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        name, digest, *rest = [*words, ""] if len(words) == 1 else words
        known = NAME.fullmatch(name) and SHA256.fullmatch(digest)
        if not known or rest not in ([], ["disabled"]):
            raise InvalidSettings(
                f"{path}, line {number} must be NAME SHA256 [disabled], with the sha256 of the key "
                "in 64 lower-case hex digits"
            )
        if any(digest == client.sha256 for client in clients):
            raise InvalidSettings(f"{path}, line {number}: the key is in the file already")
        if len(clients) == MAX_CLIENTS:
            raise InvalidSettings(f"{path} must have at most {MAX_CLIENTS} keys, got more")
        clients.append(Client(name, digest, disabled=bool(rest)))
    return clients


def bracketed(host: str) -> str:
    """An address as it stands before a port: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


def _entries(name: str, text: str) -> list[str]:
    entries = [entry.strip() for entry in text.split(",")]
    if not all(entries):
        raise _invalid(name, "must be entries separated by commas", text)
    return entries


def _split_address(name: str, entry: str) -> tuple[str, int]:
    match = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9.-]{0,252}):([0-9]{1,5})", entry)
    if not match or not 1 <= int(match[2]) <= 65535:
        raise _invalid(name, "must be HOST:PORT[,HOST:PORT…]", entry)
    return match[1], int(match[2])


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return "%" not in text  # a zone, which may hold anything


def _check_file(name: str, text: str) -> None:
    if not os.access(text, os.R_OK) or not Path(text).is_file():
        raise _invalid(name, "must be a file that can be read", text)


def _invalid(name: str, rule: str, value: object) -> InvalidSettings:
    return InvalidSettings(f"{_variable(name)} {rule}, got {value!r}")


def _variable(name: str) -> str:
    return f"{PREFIX}{name.upper()}"
