"""What a rollout does to TorchServe: registers a version beside another, and takes either away."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import requests

from handler.errors import InvalidModel, SetupError
from handler.model_card import ModelCard
from service.archive.mar import unpack
from service.options import ServeOptions
from service.plan import ModelPlan, plan_service
from service.processes import wait_until
from service.torchserve.management import Management, ModelState, UnknownModel

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

READY_SECONDS = 300
MAX_RESTARTS = 1  # of a worker while it loads, until the version is given up
DRAIN_SECONDS = 60
LEFT_OUT = "TorchServe refuses new models: start it with TS_ENABLE_MODEL_API=true"


class Unusable(Exception):
    """The new version does not load."""


def plan_archive(
    archive: Path, require_signed: str | None, workers: int
) -> tuple[ModelPlan, "Ed25519PublicKey | None"]:
    """The archive as ./scripts/serve --archive would serve it here. Raises SetupError."""
    if not archive.is_file():
        raise InvalidModel(f"{archive} is no file")
    plan = plan_service(
        ServeOptions(archives=(str(archive),), require_signed=require_signed, workers=workers)
    )
    [model] = plan.given
    return model, plan.public_key


@dataclass(frozen=True)
class Replica:
    """One TorchServe of this machine. Every method may raise requests.RequestException."""

    management: Management

    def default(self, model: str) -> ModelState:
        """The version that answers now. Raises SetupError."""
        try:
            return self.management.describe(model)
        except UnknownModel as exc:
            raise SetupError(str(exc)) from exc

    def store(self, model: str) -> Path:
        """The folder of unpacked models, in which the workers of a model are. Raises SetupError."""
        for worker in self.default(model).workers:
            try:
                folder = Path(psutil.Process(worker.pid).cwd())
            except (psutil.Error, ValueError):  # it is being started, or on another machine
                continue
            if (folder / "MAR-INF").is_dir():
                return folder.parent
        raise SetupError(
            f"no worker of {model} at {self.management.url} runs on this machine as this user: a "
            "rollout must be run beside TorchServe"
        )

    def folder(self, model: str, version: str) -> Path:
        """Where a rollout unpacks a version."""
        return self.store(model) / f"rollout-{model}-{version}"

    def card(self, model: str) -> ModelCard:
        """Of the version that answers now. Raises SetupError."""
        worker = next(worker for worker in self.default(model).workers if worker.pid > 0)
        self.store(model)  # says what is wrong
        return ModelCard.read(Path(psutil.Process(worker.pid).cwd()))

    def has(self, model: str, version: str) -> bool:
        try:
            return version in self.management.versions(model)
        except UnknownModel:
            return False

    def register(
        self, plan: ModelPlan, public_key: "Ed25519PublicKey | None", workers: int
    ) -> None:
        """Unpack, check and register a version, unless it is there. Raises SetupError."""
        if self.has(plan.name, plan.version):
            return
        folder = self.folder(plan.name, plan.version)
        shutil.rmtree(folder, ignore_errors=True)  # of a rollout that was killed
        unpack(plan.archive, plan.config, folder, plan.card, public_key)
        try:
            # TorchServe answers when the workers have loaded, or have failed to.
            replace(self.management, timeout=READY_SECONDS).register(folder.name, workers)
        except requests.HTTPError as exc:
            shutil.rmtree(folder, ignore_errors=True)
            if exc.response.status_code == requests.codes.method_not_allowed:
                raise SetupError(LEFT_OUT) from exc
            raise

    def wait_until_ready(self, model: str, version: str) -> None:
        """Raises Unusable."""
        pids: set[int] = set()

        def is_ready() -> bool:
            state = self.management.describe(f"{model}/{version}")
            pids.update(worker.pid for worker in state.workers if worker.pid > 0)
            if not state.is_ready and len(pids) > state.min_workers * (1 + MAX_RESTARTS):
                raise Unusable("its workers end again and again while they load")
            return state.is_ready

        if not wait_until(is_ready, READY_SECONDS, 0.2):
            raise Unusable(f"its workers are not ready within {READY_SECONDS} s")

    def set_default(self, model: str, version: str) -> None:
        self.management.set_default(model, version)

    def remove(self, model: str, version: str) -> None:
        """Unregister a version that no client is sent to, and remove what `register` unpacked."""
        try:
            folder = self.folder(model, version)
        except SetupError:  # no worker runs: what is left goes with TorchServe's own folder
            folder = None
        try:
            wait_until(lambda: self._is_idle(f"{model}/{version}"), DRAIN_SECONDS, 0.2)
            self.management.unregister(model, version)
        except UnknownModel:
            pass
        if folder:
            shutil.rmtree(folder, ignore_errors=True)

    def _is_idle(self, target: str) -> bool:
        return self.management.describe(target).pending == 0
