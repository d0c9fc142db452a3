"""nginx.conf for the gateway: deploy/gateway/nginx.conf.template filled in with checked values."""

import grp
import os
import pwd
import re
import resource
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from handler.errors import SetupError
from handler.machine import available_cores
from service.gateway.settings import Client, GatewaySettings

DEPLOY = Path(__file__).resolve().parents[2] / "deploy" / "gateway"
MAX_STOP_SECONDS = 30
# Connections that wait to be accepted, cut by net.core.somaxconn. nginx's own 511 overflow in a
# crowd, and a client whose connection the kernel has dropped waits 1, 3, 7, 15 s.
BACKLOG = 4096


class Replicas(NamedTuple):
    """Where the replicas are, as IP:PORT each, in order."""

    upstreams: tuple[str, ...]
    management: tuple[str, ...]

    @classmethod
    def find(cls, settings: GatewaySettings) -> "Replicas":
        """Look their names up. Raises SetupError."""
        upstreams, management = map(settings.addresses, ("upstreams", "management"))
        return cls(tuple(sorted(upstreams)), tuple(sorted(management)))


def stop_seconds(settings: GatewaySettings) -> int:
    return min(settings.response_timeout_seconds, MAX_STOP_SECONDS)


def render(
    settings: GatewaySettings,
    replicas: Replicas,
    clients: Sequence[Client],
    folder: Path,
    access_log: str,
    modules: Sequence[Path],
) -> str:
    """nginx.conf out of its template. Raises SetupError."""
    upstreams, management = replicas
    weights = settings.weights()
    first, *_ = settings.model_names
    described = {"/": f"{first}/{next(iter(weights))}" if weights else first}
    described |= {f"{name}/": name for name in settings.model_names if name not in described}
    described |= {
        f"{name}/{version}": f"{first}/{version}" for version in weights for name in ("", first)
    }
    limit = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 65536)
    workers = min(available_cores(), 4)
    body = settings.max_body_bytes
    # A replica that does not answer must not use up all the time that a request has.
    total = settings.response_timeout_seconds
    first_seconds = max(1, total // 4) if len(upstreams) > 1 else total
    values = {
        "modules": lines((f'load_module "{module}";' for module in modules), indent=0),
        "user": user_line(),
        "folder": quotable(folder),
        "pages": quotable(folder / "pages"),
        "lua": quotable(folder / "pages" / "?.lua"),
        "access_log": access_log,
        "worker_processes": workers,
        "open_files": limit,
        "connections": limit // 2,
        "targets": ", ".join(f'"{target}"' for target in targets(settings)),
        "replicas": ", ".join(
            f'{{ name = "replica_{i}", address = "{address}" }}'
            for i, address in enumerate(upstreams)
        ),
        "managements": len(management),
        "arriving_bytes": max(body, settings.max_concurrent * body // 4 // workers),
        "keys": keys_maps(settings, clients),
        "model": first,
        "split": split_map(weights),
        "described": lines(f'"{asked}" "{told}";' for asked, told in described.items()),
        "upstreams": lines(
            (
                f"upstream replica_{i} {{ server {address}; keepalive 64; "
                "keepalive_requests 1000000; }"
                for i, address in enumerate(upstreams)
            ),
            indent=4,
        ),
        "rate": max(settings.rate, 1),
        "limit_rate": f"limit_req zone=rate burst={settings.burst} nodelay;"
        if settings.rate
        else "",
        "rate_words": f"{settings.rate} a second, and " if settings.rate else "",
        "max_concurrent": settings.max_concurrent,
        "max_concurrent_per_client": settings.max_concurrent_per_client,
        "max_body_bytes": body,
        "client_timeout_seconds": settings.client_timeout_seconds,
        "body_timeout_seconds": settings.body_timeout_seconds,
        "response_timeout_seconds": total,
        "first_seconds": first_seconds,
        "second_seconds": max(1, total - first_seconds) if len(upstreams) > 1 else total,
        "metrics_allow": lines(f"{network} 1;" for network in settings.metrics_networks()),
        "listen": listen(settings, folder),
        "tls_server": tls_server(settings, folder),
        "management": lines(
            f"upstream management_{i} {{ server {address} max_fails=0; }}"
            for i, address in enumerate(management)
        ),
    }
    return fill("nginx.conf.template", values)


def targets(settings: GatewaySettings) -> list[str]:
    """What must be ready, as TorchServe calls it: MODEL, or MODEL/VERSION of one that is split."""
    weights = settings.weights()
    first, *others = settings.model_names
    return (
        [*(f"{first}/{version}" for version in weights), *others] if weights else [first, *others]
    )


def fill(template: str, values: Mapping[str, object]) -> str:
    """A template with its ${names} filled in; a $name without braces is a variable of nginx's."""
    text = (DEPLOY / template).read_text("utf-8")
    return re.sub(r"\$\{(\w+)\}", lambda name: str(values[name[1]]), text)


def lines(entries: Iterable[str], indent: int = 8) -> str:
    return ("\n" + indent * " ").join(entries)


def keys_maps(settings: GatewaySettings, clients: Sequence[Client]) -> str:
    """Who has which key: $client, a name, and $access: open, missing, disabled or granted."""
    names = lines(f'"{client.sha256}" "{client.name}";' for client in clients)
    access = lines(
        f'"{client.sha256}" {"disabled" if client.disabled else "granted"};' for client in clients
    )
    if not settings.keys_file:
        return 'map "" $client { default ""; }\n    map "" $access { default open; }'
    return (
        f'map $key_hash $client {{\n        default "";\n        {names}\n    }}\n'
        f"    map $key_hash $access {{\n        default missing;\n        {access}\n    }}"
    )


def split_map(weights: dict[str, int]) -> str:
    """$split_version: what a client that asks for no version gets, the same each time."""
    if not weights:
        return 'map "" $split_version { default ""; }'
    given = {version: percent for version, percent in weights.items() if percent}
    *some, last = given
    shares = [f"{given[version]}% {version};" for version in some] + [f"* {last};"]
    return f"split_clients $client_id $split_version {{\n        {lines(shares)}\n    }}"


def listen(settings: GatewaySettings, folder: Path) -> str:
    """Where requests arrive: from clients, or, with TLS, from the server that ends it."""
    if settings.tls_certificate:
        # The address of the client, from whom nobody else can say so.
        return (
            f'listen "unix:{quotable(folder)}/inside/sock";\n        '
            "set_real_ip_from unix:;\n        real_ip_header X-Forwarded-For;"
        )
    return f"listen {address_of(settings)};"


def address_of(settings: GatewaySettings) -> str:
    """Where clients connect."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"{host}:{settings.port} backlog={BACKLOG}"


def tls_server(settings: GatewaySettings, folder: Path) -> str:
    """What ends TLS and HTTP/2: Lua's subrequests know HTTP/1 alone, and so do the servers behind.

    TLS 1.3, and 1.2 with forward secrecy: Mozilla's "intermediate" list without DHE.
    """
    if not settings.tls_certificate:
        return ""
    ciphers = ":".join(
        f"ECDHE-{kind}-{cipher}"
        for cipher in ("AES128-GCM-SHA256", "AES256-GCM-SHA384", "CHACHA20-POLY1305")
        for kind in ("ECDSA", "RSA")
    )
    values = {
        "socket": f"{quotable(folder)}/inside/sock",
        "address": address_of(settings),
        "certificate": quotable(Path(settings.tls_certificate).resolve()),
        "key": quotable(Path(settings.tls_key).resolve()),
        "ciphers": ciphers,
        "pages": quotable(folder / "pages"),
        "timeout_seconds": settings.response_timeout_seconds + 5,  # the server behind is first
    }
    return fill("tls.conf.template", values)


def worker_user() -> pwd.struct_passwd | None:
    """Who nginx's workers run as: they give up root's rights; anybody else's keep theirs."""
    return pwd.getpwnam("nobody") if os.geteuid() == 0 else None


def user_line() -> str:
    user = worker_user()
    return f"user {user.pw_name} {grp.getgrgid(user.pw_gid).gr_name};" if user else ""


def quotable(path: Path) -> str:
    """A path between double quotes in nginx.conf. Raises SetupError if it cannot be there."""
    text = str(path)
    if re.search(r'["\\$]', text) or not text.isprintable():
        raise SetupError(f'a path may not have ", \\, $ or line ends in it, got {text!r}')
    return text
