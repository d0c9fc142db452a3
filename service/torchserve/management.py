"""TorchServe's management API: the only place that knows its routes and its JSON.

/ping is no readiness: it says Healthy while models load, while workers crash, and without a model.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote

import requests

T = TypeVar("T")
TIMEOUT_SECONDS = 10  # a frontend under load answers late


class UnknownModel(Exception):
    """TorchServe runs, but the model is not registered there."""


@dataclass(frozen=True)
class Worker:
    """One process of a model."""

    id: str
    pid: int  # not positive while there is no process yet
    device: str  # "cpu", "cuda:0", or "cuda" if TorchServe cannot tell which
    status: str  # READY, or UNLOADING, which also means loading

    @property
    def is_ready(self) -> bool:
        return self.status == "READY"


@dataclass(frozen=True)
class ModelState:
    """A version of a model, as TorchServe describes it."""

    version: str
    min_workers: int  # TorchServe starts workers until there are as many
    workers: tuple[Worker, ...]
    pending: int  # requests that wait for a worker
    remaining: int  # requests that can still wait

    @property
    def ready(self) -> int:
        """How many workers are READY."""
        return sum(worker.is_ready for worker in self.workers)

    @property
    def is_ready(self) -> bool:
        """Whether as many workers are READY as the model should have, and at least one."""
        return self.ready >= max(1, self.min_workers)

    @property
    def on_gpu(self) -> bool:
        return any(worker.device != "cpu" for worker in self.workers)


@contextmanager
def direct_session() -> Iterator[requests.Session]:
    """Connections past any proxy of the environment."""
    with requests.Session() as session:
        session.trust_env = False
        yield session


@dataclass(frozen=True)
class Management:
    """A client of the management port. Every method raises requests.RequestException.

    A model is named NAME, which is its default version, or NAME/VERSION.
    """

    url: str
    timeout: float = TIMEOUT_SECONDS

    def models(self) -> list[str]:
        """The names of all registered models."""
        names: list[str] = []
        token: str | None = None
        while True:
            page, token = self._ask("GET", "models", _parse_page, next_page_token=token)
            names += page
            if token is None:
                return names

    def describe(self, model: str) -> ModelState:
        """The model's state. Raises UnknownModel."""
        return self._ask_model("GET", model, _parse_state)

    def describe_versions(self, model: str) -> list[ModelState]:
        """The states of all versions of a model, by version. Raises UnknownModel."""
        states = self._ask_model("GET", f"{model}/all", _parse_states)
        return sorted(states, key=lambda state: state.version)

    def info(self, model: str) -> dict[str, Any]:
        """What the model's handler says of itself; a worker answers this. Raises UnknownModel."""
        return self._ask_model("GET", model, _parse_info, customized="true")

    def resize(self, model: str, workers: int) -> None:
        """Ask for a number of workers, which are there later. Raises UnknownModel.

        It sets both bounds: workers are added up to the one and stopped down to the other. It is
        not `synchronous`: TorchServe would wait on a thread that clients need.
        """
        self._ask_model("PUT", model, dict, min_worker=workers, max_worker=workers)

    def versions(self, model: str) -> list[str]:
        """The versions of a model that are registered. Raises UnknownModel."""
        return self._ask_model("GET", f"{model}/all", _parse_versions)

    def register(self, folder: str, workers: int) -> None:
        """Register an unpacked archive that is a folder of the model store.

        The answer may take as long as its workers take to load. Raises requests.HTTPError with
        status 405 if TorchServe was started without `enable_model_api`.
        """
        self._ask("POST", "models", dict, url=folder, initial_workers=workers)

    def set_default(self, model: str, version: str) -> None:
        """Have this version answer those who name none. Raises UnknownModel."""
        self._ask_model("PUT", f"{model}/{version}/set-default", dict)

    def unregister(self, model: str, version: str) -> None:
        """End the workers of a version and forget it. Raises UnknownModel."""
        self._ask_model("DELETE", f"{model}/{version}", dict)

    def _ask_model(
        self, method: str, model: str, parse: Callable[[Any], T], **query: str | int
    ) -> T:
        try:
            return self._ask(method, f"models/{quote(model)}", parse, **query)
        except requests.HTTPError as exc:
            if exc.response.status_code == 404:
                raise UnknownModel(f"{self.url} has no model {model}") from exc
            raise

    def _ask(
        self, method: str, path: str, parse: Callable[[Any], T], **query: str | int | None
    ) -> T:
        with direct_session() as session:
            url = f"{self.url}/{path}"
            response = session.request(method, url, params=query, timeout=self.timeout)
        response.raise_for_status()
        try:
            return parse(response.json())
        except (LookupError, TypeError, ValueError) as exc:
            raise requests.exceptions.InvalidJSONError("not an answer of TorchServe's") from exc


def _parse_page(answer: Any) -> tuple[list[str], str | None]:
    return [model["modelName"] for model in answer["models"]], answer.get("nextPageToken")


def _parse_info(answer: Any) -> dict[str, Any]:
    return dict(answer[0]["customizedMetadata"])


def _parse_versions(answer: Any) -> list[str]:
    return [str(facts["modelVersion"]) for facts in answer]


def _parse_state(answer: Any) -> ModelState:
    (state,) = _parse_states(answer)
    return state


def _parse_states(answer: Any) -> list[ModelState]:
    return [_parse_version(facts) for facts in answer]


def _parse_version(facts: Any) -> ModelState:
    queue = facts["jobQueueStatus"]
    return ModelState(
        version=facts["modelVersion"],
        min_workers=facts["minWorkers"],
        workers=tuple(map(_parse_worker, facts["workers"])),
        pending=queue["pendingRequests"],
        remaining=queue["remainingCapacity"],
    )


def _parse_worker(facts: Any) -> Worker:
    device = "cpu"
    if facts["gpu"]:
        found = re.search(r"gpuId::(\d+)", facts.get("gpuUsage", ""))
        device = f"cuda:{found[1]}" if found else "cuda"
    return Worker(facts["id"], facts["pid"], device, facts["status"])
