"""Package the models, start TorchServe in the foreground, say when it is ready, stop it cleanly."""

import os
import shlex
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from threading import Event

import requests

from handler.errors import InvalidSettings, SetupError
from scripts import healthcheck
from scripts.archives import archive_path, find_current, read_target
from scripts.gateway import Gateway, GatewayEnded
from scripts.gateway_settings import GatewaySettings
from scripts.options import package_argv, parse_serve
from scripts.ports import check_ports
from scripts.torchserve import (
    ROOT,
    Address,
    TorchServe,
    find_java,
    read_address,
    read_config,
    read_number,
    read_path,
)
from scripts.tuned import describe_differences

READY_SECONDS = 300
POLL_SECONDS = 0.1
MAX_RESTARTS = 1  # of a worker while it loads, until the model is given up
EXAMPLE = ROOT / "examples" / "clock.jpg"


class StartFailed(Exception):
    """TorchServe is up and a model is not; its log has the cause."""


def main(argv: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    args = parse_serve(argv)
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: what is half made is cleaned up
        signal.signal(number, signal.default_int_handler)
    try:
        config = read_config()
        check_server_settings(config)
        inference = read_address(config, "inference", args.host, args.port)
        management = read_address(config, "management", None, args.management_port)
        metrics = read_address(config, "metrics", None, args.metrics_port)
        environ = listen(config, inference, management, metrics)
        gateway = make_gateway(args, config, inference, management) if args.gateway else None
        java = find_java()
        store = read_path(config, "model_store")
        beside = find_archives(args, store)
        stale = [model for model in args.models if not find_current(model, args, store)]
        if stale and (status := package_apart(package_argv(args, stale))):
            return status  # it has said why
        for model in args.models:
            for line in describe_differences(model, args):
                if model not in stale:  # for those, packaging has said it
                    print(line, file=sys.stderr)
    except SetupError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    environ["TS_MODEL_STORE"] = str(store)
    if args.device == "cpu":
        environ["TS_NUMBER_OF_GPU"] = "0"

    stop = Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: stop.set())
    archives = [archive_path(model, args, store) for model in args.models]
    served = [*args.models, *beside.values()]
    server = TorchServe(java, config, [*archives, *beside], environ)
    try:
        server.start()
        wait_until_ready(server, management, served, stop)
        if not stop.is_set():
            if gateway:
                gateway.start()
            seconds = time.monotonic() - started
            print(banner(served, inference, management, metrics, seconds, gateway), flush=True)
        while not stop.wait(POLL_SECONDS):
            if server.exit_status() is not None:
                raise StartFailed(ending(server))
            if gateway:
                gateway.check()
    except SetupError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # nobody reads our output any more
        return 1
    except (StartFailed, GatewayEnded, requests.RequestException) as exc:
        print(f"error: {exc}; the cause is in the log above", file=sys.stderr)
        return 1
    finally:
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # a second Ctrl-C is obeyed at once
        if gateway:
            gateway.stop()  # first: what it has taken in is answered
        server.stop()
    return 0


def make_gateway(
    args: Namespace, config: dict[str, str], inference: Address, management: Address
) -> Gateway:
    """The gateway to what is served here, where GATEWAY_ variables say nothing else.

    Raises SetupError.
    """
    here = {
        "GATEWAY_UPSTREAMS": inference.url.removeprefix("http://"),
        "GATEWAY_MANAGEMENT": management.url.removeprefix("http://"),
        "GATEWAY_MODELS": ",".join(args.models),
        "GATEWAY_MAX_BODY_BYTES": str(read_number(config, "max_request_size", 6_553_500)),
    }
    port = {"GATEWAY_PORT": str(args.gateway_port)} if args.gateway_port else {}
    gateway = Gateway(GatewaySettings.load(here | os.environ | port))
    check_ports(
        {
            "predictions (--port)": (inference.host, inference.port),
            "management (--management-port)": (management.host, management.port),
            "the gateway (--gateway-port)": gateway.address,
        }
    )
    return gateway


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
    config: dict[str, str], inference: Address, management: Address, metrics: Address
) -> dict[str, str]:
    """Check the five ports, and give the variables that make TorchServe use them.

    Raises SetupError for a port that is taken.
    """
    grpc = {
        purpose: (
            config.get(f"grpc_{purpose}_address", "127.0.0.1"),
            read_number(config, f"grpc_{purpose}_port", address.grpc_port),
        )
        for purpose, address in (("inference", inference), ("management", management))
    }
    check_ports(
        {
            "predictions (--port)": (inference.host, inference.port),
            "management (--management-port)": (management.host, management.port),
            "metrics (--metrics-port)": (metrics.host, metrics.port),
            "gRPC predictions (follows --port)": grpc["inference"],
            "gRPC management (follows --management-port)": grpc["management"],
        }
    )
    return {
        "TS_INFERENCE_ADDRESS": f"http://{inference.host}:{inference.port}",
        "TS_MANAGEMENT_ADDRESS": f"http://{management.host}:{management.port}",
        "TS_METRICS_ADDRESS": f"http://{metrics.host}:{metrics.port}",
        "TS_GRPC_INFERENCE_PORT": str(grpc["inference"][1]),
        "TS_GRPC_MANAGEMENT_PORT": str(grpc["management"][1]),
        "TS_METRICS_CONFIG": str(read_path(config, "metrics_config")),
    }


def find_archives(args: Namespace, store: Path) -> dict[Path, str]:
    """The archives of `--archive` with the MODEL/VERSION that each is served under.

    Raises SetupError for one that is not in `store`, or has a version that is served already.
    """
    targets = {f"{model}/{args.version}" for model in args.models}
    found: dict[Path, str] = {}
    for name in args.archives:
        archive = (store / Path(name).name).resolve()
        if archive.parent != store or not archive.is_file():
            raise SetupError(f"--archive: {archive.name} is not in {store}")
        found[archive] = target = read_target(archive)
        if target in targets:
            raise SetupError(f"--archive: {archive.name} is {target}, which is served already")
        targets.add(target)
    return found


def package_apart(argv: Sequence[str]) -> int:
    """Run scripts/package.py in a process of its own, with which its memory for torch ends.

    Returns its exit status; raises SetupError where it was killed.
    """
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "package.py"), *argv],
        stdout=subprocess.DEVNULL,  # the archives' sizes; what it has to say goes to stderr
        start_new_session=True,  # Ctrl-C reaches us alone, and the child as SIGTERM
    )
    try:
        status = process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
    if status < 0:
        raise SetupError(
            f"packaging was killed by signal {-status} (9 is often the system out of memory)"
        )
    return status


def ending(server: TorchServe) -> str:
    """How Java ended, for people."""
    status = server.exit_status() or 0
    if status < 0:
        return f"TorchServe was killed by signal {-status} (9 is often the system out of memory)"
    return f"TorchServe ended with status {status}"


def wait_until_ready(
    server: TorchServe, management: Address, models: Sequence[str], stop: Event
) -> None:
    """Return when every model has its workers READY, or `stop` is set. Raises StartFailed."""
    deadline = time.monotonic() + READY_SECONDS
    pids: dict[str, set[int]] = {model: set() for model in models}
    while not stop.wait(POLL_SECONDS):
        if server.exit_status() is not None:
            raise StartFailed(ending(server))
        try:
            states = {model: healthcheck.describe(management.url, model) for model in models}
        except requests.RequestException:
            states = {}
        if states and all(map(healthcheck.is_ready, states.values())):
            return
        for model, state in states.items():
            if state is None:
                raise StartFailed(f"TorchServe did not accept the archive of {model}")
            pids[model] |= {worker["pid"] for worker in state["workers"] if worker["pid"] > 0}
            if len(pids[model]) > state["minWorkers"] * (1 + MAX_RESTARTS):
                raise StartFailed(f"{model} does not load: its workers end again and again")
        if time.monotonic() > deadline:
            raise StartFailed(f"not ready within {READY_SECONDS} s")


def banner(
    served: Sequence[str],
    inference: Address,
    management: Address,
    metrics: Address,
    seconds: float,
    gateway: Gateway | None = None,
) -> str:
    """What people need next, with lines that work when pasted."""
    example = shlex.quote(os.path.relpath(EXAMPLE))
    lines = []
    for model in served:
        info = healthcheck.describe(management.url, model, "?customized=true", timeout=30) or {}
        facts = info["customizedMetadata"]
        workers = info["minWorkers"]
        top_k = min(3, facts["classes"])
        predict = f"{inference.url}/predictions/{model}"
        described = f"{management.url}/models/{model}"
        lines += [
            f"{model} is ready: {workers} worker{'s' if workers > 1 else ''} on {facts['device']}, "
            f"{facts['engine']}, weights {facts['weights']['name']}",
            "",
            f"  predict   curl {predict} -T {example}",
            f"  top {top_k}     curl {predict} -F file=@{example} -F top_k={top_k}",
            f"  info      curl '{described}?customized=true'",
            f"  scale     curl -X PUT '{described}?min_worker={workers + 1}'",
            "",
        ]
    if gateway:
        url, key = gateway.url, "-H 'X-API-Key: KEY' " if gateway.has_keys else ""
        lines += [
            f"The gateway is {url}/",
            "",
            f"  predict   curl {key}{url}/predict -F file=@{example}",
            f"  health    curl {url}/health",
            f"  info      curl {key}{url}/info",
            "",
        ]
    lines += [f"  metrics   curl {metrics.url}/metrics", "  stop      Ctrl-C"]
    for address, purpose in (
        (inference, "predictions"),
        (management, "management"),
        (metrics, "metrics"),
    ):
        if address.host not in ("127.0.0.1", "localhost"):
            lines.append(f"  {purpose} are open to the network on {address.host}: see Security")
    return "\n".join(["", *lines, "", f"Ready after {seconds:.1f} s.", ""])


if __name__ == "__main__":
    sys.exit(main())
