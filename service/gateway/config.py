"""nginx.conf for the gateway: deploy/gateway/nginx.conf.jinja rendered with checked values."""

import grp
import os
import pwd
import re
import resource
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from handler.errors import SetupError
from handler.machine import available_cores
from service.gateway.settings import Client, GatewaySettings, bracketed

DEPLOY = Path(__file__).resolve().parents[2] / "deploy" / "gateway"
# Connections that wait to be accepted; the kernel lowers it to net.core.somaxconn. nginx's own 511
# overflow in a crowd, and a client whose connection the kernel has dropped waits 1, 3, 7, 15 s.
BACKLOG = 4096
# nginx takes about a thirtieth of the CPU that TorchServe takes for a request on a CPU. More of its
# workers than the load needs cost CPU: each wakes for fewer events, with colder caches.
CORES_PER_WORKER = 4
MAX_WORKERS = 4
GRPC_SLACK_SECONDS = 20  # until a gRPC server that does not keep its own limits is given up
# Of an answer that feedback may judge: its id of 36 characters, client, model, version, best class
# and nginx's own bookkeeping take 256, a power of two, or 512 if the names are long.
FEEDBACK_BYTES = 260
JOBS_CLIENT = "(jobs)"  # who asks for jobs' images; no name in a keys file can be this


class Replicas(NamedTuple):
    """Where the replicas are, as IP:PORT each, in order."""

    upstreams: tuple[str, ...]
    management: tuple[str, ...]

    @classmethod
    def find(cls, settings: GatewaySettings) -> "Replicas":
        """Look their names up. Raises SetupError."""
        return cls(settings.addresses("upstreams"), settings.addresses("management"))


def state(replicas: Replicas, clients: Iterable[Client]) -> dict[str, Any]:
    """What nginx is told, when it starts and later, without a reload: see state.lua."""
    return replicas._asdict() | {
        "left_out": {},
        "clients": {
            client.sha256: f"{'disabled' if client.disabled else 'granted'} {client.name}"
            for client in clients
        },
    }


def render(
    settings: GatewaySettings, folder: Path, access_log: str, modules: Iterable[Path]
) -> str:
    """nginx.conf for a gateway whose folder has a copy of deploy/gateway in `pages`.

    Raises SetupError if a path cannot stand in it.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # only the gateway needs it

    body, total = settings.max_body_bytes, settings.response_timeout_seconds
    host = bracketed(settings.host)
    # A replica that does not answer must not use up all the time that a request has, unless it is
    # the only one.
    first = max(1, total // 4)
    workers = min(max(1, available_cores() // CORES_PER_WORKER), MAX_WORKERS)
    environment = Environment(
        loader=FileSystemLoader(DEPLOY),
        undefined=StrictUndefined,
        trim_blocks=True,
        autoescape=False,  # noqa: S701 - nginx's syntax; no value can hold any of it
    )
    environment.filters["absolute"] = absolute
    return environment.get_template("nginx.conf.jinja").render(
        settings=settings,
        jobs_client=JOBS_CLIENT,
        folder=folder,
        access_log=access_log,
        modules=modules,
        user=user_and_group(),
        worker_processes=workers,
        open_files=min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 65536),
        arriving_bytes=max(body, settings.max_concurrent * body // 4 // workers),
        feedback_bytes=2**16 + settings.feedback_requests * FEEDBACK_BYTES,
        targets=targets(settings),
        described=described(settings),
        shares=shares(settings.weights()),
        trusted_proxies=settings.networks("trusted_proxies") if settings.trusted_proxies else [],
        tries={"_first": first, "_second": max(1, total - first), "_only": total},
        listen=f"{host}:{settings.port} backlog={BACKLOG}",
        grpc_listen=f"{host}:{settings.grpc_port} backlog={BACKLOG}",
        grpc_seconds=settings.body_timeout_seconds + total + GRPC_SLACK_SECONDS,
    )


def targets(settings: GatewaySettings) -> list[str]:
    """What must be ready, as TorchServe calls it: MODEL, or MODEL/VERSION of one that is split."""
    first, *others = settings.model_names
    return [*([f"{first}/{version}" for version in settings.weights()] or [first]), *others]


def described(settings: GatewaySettings) -> dict[str, str]:
    """What /info describes, by MODEL/VERSION as a client asks for it; either may be empty."""
    first = settings.model_names[0]
    found = {"/": targets(settings)[0]} | {f"{name}/": name for name in settings.model_names}
    for version in settings.weights():
        found[f"/{version}"] = found[f"{first}/{version}"] = f"{first}/{version}"
    return found


def shares(weights: dict[str, int]) -> list[tuple[str, str]]:
    """The share and the version of each entry of split_clients; the last takes what is left."""
    given = [(f"{percent}%", version) for version, percent in weights.items() if percent]
    return [*given[:-1], ("*", given[-1][1])] if given else []


def worker_user() -> pwd.struct_passwd | None:
    """Who nginx's workers run as: they give up root's rights; anybody else's keep theirs."""
    return pwd.getpwnam("nobody") if os.geteuid() == 0 else None


def check_reachable(folder: Path) -> None:
    """Raise SetupError if nginx's workers cannot get to a folder because one above it is closed."""
    user = worker_user()
    if user is None:
        return
    for parent in folder.parents:
        stat = parent.stat()
        if not stat.st_mode & 0o001 and stat.st_uid != user.pw_uid:
            raise SetupError(
                f"TMPDIR: {parent} is closed to {user.pw_name}, as whom nginx's workers run; "
                "choose another, or chmod o+x"
            )


def user_and_group() -> str:
    """The names of nginx's `user`, empty if its workers run as we do."""
    user = worker_user()
    return f"{user.pw_name} {grp.getgrgid(user.pw_gid).gr_name}" if user else ""


def absolute(path: Path | str) -> str:
    """An absolute path between double quotes in nginx.conf. Raises SetupError if it cannot be."""
    text = str(Path(path).resolve())
    if re.search(r'["\\$]', text) or not text.isprintable():
        raise SetupError(f'a path may not have ", \\, $ or line ends in it, got {text!r}')
    return text
