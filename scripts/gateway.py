"""Run nginx in front of TorchServe: POST /predict, GET /health, GET /info, keys, limits, retries.

Settings are environment variables GATEWAY_…, listed in docs/gateway.md.
"""

import argparse
import grp
import hashlib
import os
import pwd
import re
import resource
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import NamedTuple

from handler.errors import SetupError
from handler.machine import available_cores
from scripts.gateway_settings import NAME, Client, GatewaySettings, name_ignored, read_keys
from scripts.logs import Log, default_form
from scripts.ports import check_ports
from scripts.signals import on_stop

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy" / "gateway"
PACKAGES = "nginx libnginx-mod-http-js"  # Debian's and Ubuntu's names
MODULE = "ngx_http_js_module.so"
PLACES = ("/usr/local/sbin", "/usr/sbin")  # where nginx is and people's PATH is not
POLL_SECONDS = 0.2
RESOLVE_SECONDS = 5  # between two looks at the addresses behind the replicas' names
MAX_STOP_SECONDS = 30


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/gateway.py", description=__doc__)
    parser.add_argument(
        "--new-key", metavar="NAME", help="print a new key of a client and its line for the file"
    )
    args = parser.parse_args(argv)
    if args.new_key is not None:
        return new_key(args.new_key)
    stop = Event()
    on_stop(lambda *_: stop.set())
    gateway = None
    log = Log(default_form())
    name_ignored(log)
    try:
        settings = GatewaySettings.load()
        gateway = Gateway(settings, log)
        gateway.start()
        print(f"Gateway on {settings.url}", file=sys.stderr, flush=True)
        while not stop.wait(POLL_SECONDS):
            gateway.check()
    except SetupError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    except GatewayEnded as exc:
        print(f"error: {exc}; the cause is in the log above", file=sys.stderr)
        return 1
    finally:
        if gateway:
            gateway.stop()
    return 0


def new_key(name: str) -> int:
    """Print a key, which is kept nowhere, and the line that lets it in."""
    if not NAME.fullmatch(name):
        print(f"error: a client's name must match {NAME.pattern}, got {name!r}", file=sys.stderr)
        return 2
    key = secrets.token_urlsafe(32)
    print(f"key, for the client: {key}")
    print(f"line for the file:   {name} {hashlib.sha256(key.encode()).hexdigest()}")
    return 0


class Replicas(NamedTuple):
    """Where the replicas are, as IP:PORT each, in order."""

    upstreams: tuple[str, ...]
    management: tuple[str, ...]

    @classmethod
    def find(cls, settings: GatewaySettings) -> "Replicas":
        """Look their names up. Raises SetupError."""
        upstreams, management = map(settings.addresses, ("upstreams", "management"))
        return cls(tuple(sorted(upstreams)), tuple(sorted(management)))


class GatewayEnded(Exception):
    """nginx was up and is no more; its log has the cause."""


class Gateway:
    """One nginx, in a folder of its own."""

    def __init__(self, settings: GatewaySettings, output: Log) -> None:
        """`output` takes the access log.

        Raises SetupError where nginx or its module is not installed, or a key is malformed.
        """
        self._settings = settings
        self._output = output
        self._nginx, self._module = find_nginx()
        self._clients = read_keys(settings.keys_file) if settings.keys_file else []
        self._replicas = Replicas.find(settings)
        self._looked = time.monotonic()
        self._seen = self._changed = self._stamp()
        self._process: subprocess.Popen[bytes] | None = None
        self._log: threading.Thread | None = None
        self._folder = Path()

    def start(self) -> None:
        """Check the configuration and start nginx. Raises SetupError."""
        check_ports({"the gateway (GATEWAY_PORT)": self.address})
        self._folder = Path(tempfile.mkdtemp(prefix="gateway-"))
        self._folder.chmod(0o711)  # nginx's workers have another user where its master is root
        copy_pages(self._folder / "pages")  # which may not reach into our home
        reader, writer = os.pipe()
        self._access_log = f"/dev/fd/{writer}"
        try:
            self._write()
            checked = subprocess.run(
                [*self._command(), "-t", "-q"],
                capture_output=True,
                text=True,
                check=False,
                pass_fds=[writer],
            )
            if checked.returncode != 0:
                _, _, reason = checked.stderr.splitlines()[0].partition(": ")  # time, process
                raise SetupError(f"nginx refuses its configuration: {reason}")
            pid_file = self._folder / "nginx.pid"
            pid_file.unlink(missing_ok=True)  # the check leaves one
            self._process = subprocess.Popen(
                self._command(),
                stdin=subprocess.DEVNULL,
                pass_fds=[writer],
                start_new_session=True,  # Ctrl-C reaches us alone
            )
        finally:
            os.close(writer)
            self._log = threading.Thread(target=self._relay, args=(reader,))
            self._log.start()
        deadline = time.monotonic() + 10
        while not pid_file.exists():  # it is written when nginx listens
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise SetupError("nginx did not start; the cause is in the log above")
            time.sleep(0.02)

    def _command(self) -> list[str]:
        return [self._nginx, "-p", str(self._folder), "-c", str(self._folder / "nginx.conf")]

    def _relay(self, reader: int) -> None:
        """Pass the access log on until nginx has ended.

        Through a pipe, because nginx would open stdout anew, and write over what others write to
        the same file.
        """
        with open(reader, "rb") as output:
            self._output.relay(output)

    def _write(self) -> None:
        config = render(
            self._settings,
            self._replicas,
            self._clients,
            self._folder,
            self._access_log,
            self._module,
        )
        path = self._folder / "nginx.conf"
        path.with_suffix(".new").write_text(config, "utf-8")
        path.with_suffix(".new").replace(path)

    def _stamp(self) -> tuple[object, ...]:
        """What changes with the keys file, and with the replicas."""
        replicas = self._find_replicas()
        try:
            stat = self._settings.keys_file.stat() if self._settings.keys_file else None
        except OSError:
            return (0, replicas)
        return (stat.st_mtime_ns, stat.st_size, stat.st_ino, replicas) if stat else (replicas,)

    def _find_replicas(self) -> Replicas:
        """The replicas, as they were last found: a name that fails holds nothing else up."""
        if time.monotonic() - self._looked >= RESOLVE_SECONDS:
            with suppress(SetupError):
                self._replicas = Replicas.find(self._settings)
            self._looked = time.monotonic()
        return self._replicas

    def check(self) -> None:
        """To be called again and again: take in a keys file, or replicas, that have changed.

        What is broken leaves them as they were. Raises GatewayEnded.
        """
        if self._process is None:
            return
        if (status := self._process.poll()) is not None:
            raise GatewayEnded(f"nginx ended with status {status}")
        stamp = self._stamp()
        if stamp != self._changed:  # and may still be changing: editors empty a file first
            self._changed = stamp
            return
        if stamp == self._seen:
            return
        self._seen = stamp
        try:
            if self._settings.keys_file:
                self._clients = read_keys(self._settings.keys_file)
            self._write()
        except SetupError as exc:
            print(f"error: {exc}; the keys stay as they were", file=sys.stderr, flush=True)
            return
        self._process.send_signal(signal.SIGHUP)

    @property
    def url(self) -> str:
        """For a client on this machine."""
        return self._settings.url

    @property
    def address(self) -> tuple[str, int]:
        return self._settings.host, self._settings.port

    @property
    def has_keys(self) -> bool:
        return self._settings.keys_file is not None

    def stop(self) -> None:
        """Close the listeners, let requests in flight be answered, and end."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            try:
                self._process.wait(stop_seconds(self._settings) + 5)
            except (subprocess.TimeoutExpired, KeyboardInterrupt):  # a second Ctrl-C
                self._process.terminate()
                self._process.wait()
            with suppress(ProcessLookupError):  # workers outlive a master that was killed
                os.killpg(self._process.pid, signal.SIGKILL)
        if self._log is not None:
            self._log.join()
        if self._folder != Path():
            shutil.rmtree(self._folder, ignore_errors=True)


def copy_pages(folder: Path) -> None:
    """Copy deploy/gateway so that every user can read it, however the checkout was made."""
    shutil.copytree(DEPLOY, folder, copy_function=shutil.copyfile)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def find_nginx() -> tuple[str, str]:
    """nginx and its JavaScript module. Raises SetupError that says how to get them."""
    path = os.pathsep.join([os.environ.get("PATH", ""), *PLACES])
    nginx = shutil.which("nginx", path=path)
    if nginx is None:
        raise SetupError(f"the gateway needs nginx: apt-get install {PACKAGES}")
    built = subprocess.run([nginx, "-V"], capture_output=True, text=True, check=False).stderr
    folder = re.search(r"--modules-path=(\S+)", built)
    module = Path(folder[1] if folder else "/usr/lib/nginx/modules") / MODULE
    if not module.is_file():
        raise SetupError(f"the gateway needs nginx's {MODULE}: apt-get install {PACKAGES}")
    return nginx, str(module)


def stop_seconds(settings: GatewaySettings) -> int:
    return min(settings.response_timeout_seconds, MAX_STOP_SECONDS)


def render(
    settings: GatewaySettings,
    replicas: Replicas,
    clients: Sequence[Client],
    folder: Path,
    access_log: str,
    module: str,
) -> str:
    """nginx.conf out of its template. Raises SetupError."""
    upstreams, management = replicas
    weights = settings.weights()
    first, *_ = settings.model_names
    targets = [
        *(f"{first}/{version}" for version in weights),
        *(name for name in settings.model_names if name != first or not weights),
    ]
    described = {"/": f"{first}/{next(iter(weights))}" if weights else first}
    described |= {f"{name}/": name for name in settings.model_names if name not in described}
    described |= {
        f"{name}/{version}": f"{first}/{version}" for version in weights for name in ("", first)
    }
    limit = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 65536)
    values = {
        "js_module": module,
        "user": nobody(),
        "folder": quotable(folder),
        "pages": quotable(folder / "pages"),
        "script": quotable(folder / "pages" / "gateway.js"),
        "access_log": access_log,
        "worker_processes": min(available_cores(), 4),
        "open_files": limit,
        "connections": limit // 2,
        "stop_seconds": stop_seconds(settings),
        "health_targets": " ".join(targets),
        "replicas": len(management),
        "keys": keys_maps(settings, clients),
        "model": first,
        "split": split_map(weights),
        "described": lines(f'"{asked}" "{told}";' for asked, told in described.items()),
        "servers": lines(f"server {address} max_fails=1 fail_timeout=5s;" for address in upstreams),
        "others": other_replicas(upstreams),
        "others_of": lines(f'"1 {address}" others_{i};' for i, address in enumerate(upstreams)),
        # A replica that is alone gets a second try itself: it may have other workers.
        "retriable": '"~^50(0|2|3|7) " 1;' if len(upstreams) > 1 else '"~^50(0|7) " 1;',
        "rate": max(settings.rate, 1),
        "limit_rate": f"limit_req zone=rate burst={settings.burst} nodelay;"
        if settings.rate
        else "",
        "rate_words": f"{settings.rate} a second, and " if settings.rate else "",
        "max_concurrent": settings.max_concurrent,
        "max_concurrent_per_client": settings.max_concurrent_per_client,
        "max_body_bytes": settings.max_body_bytes,
        "client_timeout_seconds": settings.client_timeout_seconds,
        "response_timeout_seconds": settings.response_timeout_seconds,
        "info_seconds": len(management) * settings.response_timeout_seconds + 1,
        "metrics_allow": lines(f"{network} 1;" for network in settings.metrics_networks()),
        "listen": listen(settings),
        "tls": tls(settings),
        "management": lines(
            f"upstream management_{i} {{ server {address} max_fails=0; }}"
            for i, address in enumerate(management)
        ),
    }
    template = (DEPLOY / "nginx.conf.template").read_text("utf-8")
    # A $name without braces is a variable of nginx's.
    return re.sub(r"\$\{(\w+)\}", lambda name: str(values[name[1]]), template)


def lines(entries: Iterable[str]) -> str:
    return "\n        ".join(entries)


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


def other_replicas(upstreams: Sequence[str]) -> str:
    """An upstream for each replica that has all others; the replica itself where it is alone."""
    blocks = []
    for i, address in enumerate(upstreams):
        rest = [other for other in upstreams if other != address] or [address]
        servers = " ".join(f"server {other} max_fails=1 fail_timeout=5s;" for other in rest)
        blocks.append(f"upstream others_{i} {{ zone others_{i} 64k; {servers} }}")
    return "\n    ".join(blocks)


def listen(settings: GatewaySettings) -> str:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"{host}:{settings.port}" + (" ssl http2" if settings.tls_certificate else "")


def tls(settings: GatewaySettings) -> str:
    """TLS 1.3, and 1.2 with forward secrecy: Mozilla's "intermediate" list without DHE."""
    if not settings.tls_certificate:
        return ""
    ciphers = ":".join(
        f"ECDHE-{kind}-{cipher}"
        for cipher in ("AES128-GCM-SHA256", "AES256-GCM-SHA384", "CHACHA20-POLY1305")
        for kind in ("ECDSA", "RSA")
    )
    return "\n        ".join(
        [
            f'ssl_certificate "{quotable(Path(settings.tls_certificate).resolve())}";',
            f'ssl_certificate_key "{quotable(Path(settings.tls_key).resolve())}";',
            "ssl_protocols TLSv1.2 TLSv1.3;",
            f"ssl_ciphers {ciphers};",
            "ssl_prefer_server_ciphers off;",
            "ssl_session_cache shared:tls:10m;",
            "ssl_session_timeout 1d;",
            "ssl_session_tickets off;",
            'add_header Strict-Transport-Security "max-age=63072000" always;',
        ]
    )


def nobody() -> str:
    """Workers give up root's rights; anybody else's nginx keeps the ones it has."""
    if os.geteuid() != 0:
        return ""
    user = pwd.getpwnam("nobody")
    return f"user {user.pw_name} {grp.getgrgid(user.pw_gid).gr_name};"


def quotable(path: Path) -> str:
    """A path between double quotes in nginx.conf. Raises SetupError where it cannot be there."""
    text = str(path)
    if re.search(r'["\\$]', text) or not text.isprintable():
        raise SetupError(f'a path may not have ", \\, $ or line ends in it, got {text!r}')
    return text


if __name__ == "__main__":
    sys.exit(main())
