"""Package the models, start TorchServe in the foreground, say when it is ready, stop it cleanly."""

import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from threading import Event

import requests

from handler.errors import InvalidModel, SetupError
from handler.model_card import ModelCard
from service.archive.digest import is_current
from service.archive.mar import read_card
from service.banner import announce
from service.gateway.process import Gateway, GatewayEnded
from service.logs import Log
from service.plan import ModelPlan, PackagePlan, ServicePlan
from service.ports import check_ports
from service.processes import Guardian, on_stop, wait_until
from service.torchserve.config import ROOT
from service.torchserve.java import find_java
from service.torchserve.management import Management, UnknownModel
from service.torchserve.server import Served, TorchServe

READY_SECONDS = 300
POLL_SECONDS = 0.1
MAX_RESTARTS = 1  # of a worker while it loads, until the model is given up

# The working directory, which may hold modules of these names, is not looked in.
PACKAGE = (
    f"import sys; sys.path[0] = {str(ROOT)!r}; "
    "from service.archive.packaging import package_from; sys.exit(package_from(sys.stdin.buffer))"
)


class StartFailed(Exception):
    """TorchServe is up and a model is not; its log has the cause."""


def prepare(plan: ServicePlan, log: Log) -> tuple[TorchServe, Gateway | None]:
    """Check and make all that is needed before Java starts, archives included.

    Raises SetupError, KeyboardInterrupt, and SystemExit if packaging has said what is wrong.
    """
    for note in plan.notes:
        print(note, file=sys.stderr)
    gateway = Gateway(plan.gateway, log) if plan.gateway else None
    ports = plan.server.addresses.by_purpose()
    if gateway:
        ports |= {"the gateway (--gateway-port)": gateway.address} | gateway.grpc_address
    check_ports(ports)
    java = find_java()
    stale = [package for package in plan.packages if not is_current(package)]
    if stale and plan.public_key:
        raise InvalidModel(
            f"{stale[0].archive} is missing or out of date, and would be made without a signature: "
            "make it with ./scripts/package --sign KEY.pem"
        )
    if stale and (status := package_apart(stale)):
        raise SystemExit(status)
    # The plan's card was read before the archive was checked, so that no other archive than the
    # checked one is served.
    served = [
        Served(model.archive, model.config, card_of(model, made=model in stale), plan.public_key)
        for model in plan.models
    ]
    return TorchServe(java, plan.server, served, plan.environ), gateway


def card_of(model: ModelPlan, made: bool) -> ModelCard:
    """That of a model's archive; `made`: since it was planned. Raises InvalidModel."""
    card = read_card(model.archive) if made else model.card
    if card is None:
        raise InvalidModel(f"{model.archive} is damaged")
    return card


def package_apart(plans: Sequence[PackagePlan]) -> int:
    """Make archives in a process of its own, with which its memory for torch ends.

    Returns its exit status; raises SetupError if it was killed.
    """
    command = [sys.executable, "-c", PACKAGE]
    with Guardian() as guardian:
        # It prints the archives' sizes on stdout; what it has to say goes to stderr.
        process = guardian.start(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        process.communicate(pickle.dumps(plans))
    if process.returncode < 0:
        raise SetupError(
            f"packaging was killed by signal {-process.returncode} "
            "(9 is often the system out of memory)"
        )
    return process.returncode


def run(
    plan: ServicePlan, server: TorchServe, gateway: Gateway | None, log: Log, started: float
) -> int:
    """Serve until the first SIGTERM or Ctrl-C; the exit status.

    `started` is when the command was, by time.monotonic().
    """
    try:
        serve_until_stopped(plan, server, gateway, log, started)
    except SetupError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    except (StartFailed, GatewayEnded, requests.RequestException) as exc:
        log.event("ERROR", "failed", message=str(exc))
        print(f"error: {exc}; see the log above", file=sys.stderr)
        return 1
    log.event("INFO", "stopped")
    return 0


def serve_until_stopped(
    plan: ServicePlan, server: TorchServe, gateway: Gateway | None, log: Log, started: float
) -> None:
    """Start everything, and return or raise what went wrong only when all of it has ended."""
    stop = Event()
    on_stop(lambda *_: stop.set())
    addresses, served = plan.server.addresses, [model.served_as for model in plan.models]
    try:
        server.start(lambda output: log.relay(output, server.read))
        wait_until_ready(server, Management(addresses.management.url), served, stop)
        if not stop.is_set():
            if gateway:
                gateway.start()
            announce(log, served, addresses, gateway, time.monotonic() - started)
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
    finally:
        # A second Ctrl-C is obeyed at once.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            if gateway:
                gateway.stop()  # first: what it has taken in is answered
        finally:
            server.stop()


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
            reason = server.startup_failure(model) or "its workers end again and again"
            raise StartFailed(f"{model} does not load: {reason}")
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
