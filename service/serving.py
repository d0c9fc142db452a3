"""Package the models, start TorchServe in the foreground, say when it is ready, stop it cleanly."""

import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import requests

from handler.errors import InvalidSettings, SetupError
from handler.machine import count_gpus
from service.archive.store import (
    archive_path,
    check_device_ids,
    find_current,
    given_config,
    model_config,
    read_digest,
    read_target,
)
from service.banner import announce
from service.gateway.process import Gateway, GatewayEnded
from service.gateway.settings import GatewaySettings, name_ignored
from service.logs import Log, default_form
from service.options import package_argv, parse_serve
from service.ports import check_ports
from service.processes import Guardian, on_stop, wait_until
from service.torchserve.java import find_java
from service.torchserve.management import Management, UnknownModel
from service.torchserve.server import (
    ROOT,
    Addresses,
    TorchServe,
    check_gpus,
    gpu_environment,
    read_addresses,
    read_config,
    read_number,
    read_path,
    usable_gpus,
)
from service.tuning.tuned import describe_differences

READY_SECONDS = 300
POLL_SECONDS = 0.1
MAX_RESTARTS = 1  # of a worker while it loads, until the model is given up


class StartFailed(Exception):
    """TorchServe is up and a model is not; its log has the cause."""


@dataclass(frozen=True)
class Service:
    """What is about to run, checked."""

    server: TorchServe
    gateway: Gateway | None
    addresses: Addresses
    served: list[str]  # MODEL or MODEL/VERSION, as the management port calls them


def main(argv: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    args = parse_serve(argv)
    log = Log(args.log_format or default_form())
    on_stop(signal.default_int_handler)  # what is half made is cleaned up
    try:
        service = prepare(args, log)
    except SetupError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130

    stop = Event()
    on_stop(lambda *_: stop.set())
    server, gateway = service.server, service.gateway
    try:
        server.start(lambda output: log.relay(output, server.read))
        management = Management(service.addresses.management.url)
        wait_until_ready(server, management, service.served, stop)
        if not stop.is_set():
            if gateway:
                gateway.start()
            seconds = time.monotonic() - started
            announce(log, service.served, service.addresses, gateway, seconds)
        while not stop.wait(POLL_SECONDS):
            if server.exit_status() is not None:
                raise StartFailed(ending(server))
            for hung in server.end_hung_workers():
                log.event(
                    "ERROR",
                    "worker_hung",
                    pid=hung.pid,
                    model=hung.model,
                    message="no sign of life; killed, and TorchServe starts another",
                )
            if gateway:
                gateway.check()
        log.event("INFO", "stopping")
    except SetupError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    except (StartFailed, GatewayEnded, requests.RequestException) as exc:
        log.event("ERROR", "failed", message=str(exc))
        print(f"error: {exc}; the cause is in the log above", file=sys.stderr)
        return 1
    finally:
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # a second Ctrl-C is obeyed at once
        try:
            if gateway:
                gateway.stop()  # first: what it has taken in is answered
        finally:
            server.stop()
    log.event("INFO", "stopped")
    return 0


def prepare(args: Namespace, log: Log) -> Service:
    """Check and make all that is needed before Java starts, archives included.

    Raises SetupError, KeyboardInterrupt, and SystemExit where packaging has said what is wrong.
    """
    name_ignored(log)
    config = read_config()
    check_server_settings(config)
    addresses = read_addresses(config, args)
    given = find_archives(args)
    served = [*args.models, *given.values()]
    gateway = make_gateway(args, served, config, addresses, log) if args.gateway else None
    environ = listen(config, addresses, gateway)
    if warning := check_gpus(args.device, count_gpus(), os.environ):
        print(warning, file=sys.stderr)
    gpus = usable_gpus(config)
    environ |= gpu_environment(args.device, gpus, os.environ)
    for model in args.models:
        check_device_ids(model_config(model, args), gpus)
    java = find_java()
    store = read_path(config, "model_store")
    paths = {model: archive_path(model, args, store) for model in args.models}
    # Before they are checked, so that no other archive than the checked one is served.
    digests = {archive: read_digest(archive) for archive in [*paths.values(), *given]}
    stale = [model for model in args.models if not find_current(model, args, store)]
    if stale and (status := package_apart(package_argv(args, stale))):
        raise SystemExit(status)
    digests |= {paths[model]: read_digest(paths[model]) for model in stale}
    for model in args.models:
        for line in describe_differences(model, args):
            if model not in stale:  # for those, packaging has said it
                print(line, file=sys.stderr)
    archives = {paths[model]: model_config(model, args) for model in args.models}
    archives |= {archive: given_config(archive, args) for archive in given}
    server = TorchServe(java, config, archives, environ, digests)
    return Service(server, gateway, addresses, served)


def make_gateway(
    args: Namespace,
    served: Sequence[str],
    config: dict[str, str],
    addresses: Addresses,
    log: Log,
) -> Gateway:
    """The gateway to what is served here, where GATEWAY_ variables say nothing else.

    Raises SetupError.
    """
    here = {
        "GATEWAY_UPSTREAMS": addresses.inference.url.removeprefix("http://"),
        "GATEWAY_MANAGEMENT": addresses.management.url.removeprefix("http://"),
        "GATEWAY_MODELS": ",".join(dict.fromkeys(name.partition("/")[0] for name in served)),
        "GATEWAY_MAX_BODY_BYTES": str(read_number(config, "max_request_size", 6_553_500)),
    }
    port = {"GATEWAY_PORT": str(args.gateway_port)} if args.gateway_port else {}
    return Gateway(GatewaySettings.load(here | os.environ | port), log)


def check_server_settings(config: dict[str, str]) -> None:
    """Raise InvalidSettings for what TorchServe takes and this script cannot work with."""
    if config.get("disable_token_authorization") != "true":
        raise InvalidSettings(
            "disable_token_authorization must be true: the health check sends no token"
        )
    if config.get("metrics_mode", "log") not in ("log", "prometheus", "legacy"):
        raise InvalidSettings(
            f"metrics_mode must be log, prometheus or legacy, got {config['metrics_mode']!r}"
        )
    if not read_path(config, "metrics_config").is_file():
        raise InvalidSettings(f"metrics_config: {config['metrics_config']} is not a file")
    if config.get("enable_envvars_config") != "true":
        raise InvalidSettings("enable_envvars_config must be true: the options are passed that way")


def listen(
    config: dict[str, str], addresses: Addresses, gateway: Gateway | None = None
) -> dict[str, str]:
    """Check the ports, and give the variables that make TorchServe use its five.

    Raises SetupError for a port that is taken.
    """
    inference, management, metrics = addresses.inference, addresses.management, addresses.metrics
    grpc = {
        purpose: (
            config.get(f"grpc_{purpose}_address", "127.0.0.1"),
            read_number(config, f"grpc_{purpose}_port", address.grpc_port),
        )
        for purpose, address in (("inference", inference), ("management", management))
    }
    check_ports(
        {
            "predictions (--port)": inference.pair,
            "management (--management-port)": management.pair,
            "metrics (--metrics-port)": metrics.pair,
            "gRPC predictions (follows --port)": grpc["inference"],
            "gRPC management (follows --management-port)": grpc["management"],
        }
        | ({"the gateway (--gateway-port)": gateway.address} if gateway else {})
    )
    return {
        "TS_INFERENCE_ADDRESS": f"http://{inference.host}:{inference.port}",
        "TS_MANAGEMENT_ADDRESS": f"http://{management.host}:{management.port}",
        "TS_METRICS_ADDRESS": f"http://{metrics.host}:{metrics.port}",
        "TS_GRPC_INFERENCE_PORT": str(grpc["inference"][1]),
        "TS_GRPC_MANAGEMENT_PORT": str(grpc["management"][1]),
        "TS_METRICS_CONFIG": str(read_path(config, "metrics_config")),
    }


def find_archives(args: Namespace) -> dict[Path, str]:
    """The archives of `--archive` with the MODEL/VERSION that each is served under.

    Raises SetupError for one that is missing, or has a version that is served already.
    """
    targets = {f"{model}/{args.version}" for model in args.models}
    found: dict[Path, str] = {}
    for name in args.archives:
        path = Path(name)
        archives = sorted(path.glob("*.mar")) if path.is_dir() else [path]
        if not archives:
            raise SetupError(f"--archive: there is no .mar file in {path}")
        for archive in archives:
            found[archive] = target = read_target(archive)
            if target in targets:
                raise SetupError(f"--archive: {archive} is {target}, which is served already")
            targets.add(target)
    return found


def package_apart(argv: Sequence[str]) -> int:
    """Run ./scripts/package in a process of its own, with which its memory for torch ends.

    Returns its exit status; raises SetupError where it was killed.
    """
    command = [sys.executable, ROOT / "scripts" / "package.py", *argv]
    with Guardian() as guardian:
        # It prints the archives' sizes on stdout; what it has to say goes to stderr.
        status = guardian.start(command, stdout=subprocess.DEVNULL).wait()
    if status < 0:
        raise SetupError(
            f"packaging was killed by signal {-status} (9 is often the system out of memory)"
        )
    return status


def ending(server: TorchServe) -> str:
    """How Java ended, for people."""
    if words := server.out_of_memory():
        return f"Java is out of memory ({words})"
    status = server.exit_status() or 0
    if status < 0:
        return f"TorchServe was killed by signal {-status} (9 is often the system out of memory)"
    return f"TorchServe ended with status {status}"


def wait_until_ready(
    server: TorchServe, management: Management, models: Sequence[str], stop: Event
) -> None:
    """Return when every model has its workers READY, or `stop` is set. Raises StartFailed."""
    pids: dict[str, set[int]] = {model: set() for model in models}

    def is_ready(model: str) -> bool:
        try:
            state = management.describe(model)
        except UnknownModel as exc:
            raise StartFailed(f"TorchServe did not accept the archive of {model}") from exc
        pids[model] |= {worker.pid for worker in state.workers if worker.pid > 0}
        if not state.is_ready and len(pids[model]) > state.min_workers * (1 + MAX_RESTARTS):
            raise StartFailed(f"{model} does not load: its workers end again and again")
        return state.is_ready

    def all_ready() -> bool:
        if server.exit_status() is not None:
            raise StartFailed(ending(server))
        try:
            ready = [is_ready(model) for model in models]  # every one, for its failure
        except requests.RequestException:  # Java is starting
            return False
        return all(ready)

    if not wait_until(lambda: stop.is_set() or all_ready(), READY_SECONDS, POLL_SECONDS):
        raise StartFailed(f"not ready within {READY_SECONDS} s")
