"""Exit 0 only when every wanted model has all its workers READY, and answers a prediction.

TorchServe's own /ping says Healthy while models load, while workers crash, and without any model;
its workers say READY while every prediction fails.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import requests

from handler.errors import SetupError
from service.gateway.settings import GatewaySettings
from service.gateway.watch import ask_prediction

TIMEOUT_SECONDS = 5


def get(url: str, timeout: float, verify: bool = True) -> requests.Response:
    """GET on a connection of its own, past any proxy of the environment."""
    with requests.Session() as session:
        session.trust_env = False
        return session.get(url, timeout=timeout, verify=verify)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="./scripts/healthcheck", description=__doc__)
    parser.add_argument("models", nargs="*", help="default: every registered model, at least one")
    parser.add_argument(
        "--management", default="http://127.0.0.1:8081", help="management address (%(default)s)"
    )
    parser.add_argument(
        "--predictions", default="http://127.0.0.1:8080", help="predictions address (%(default)s)"
    )
    parser.add_argument(
        "--gateway",
        action="store_true",
        help="ask the gateway that the GATEWAY_ variables describe for its /health instead",
    )
    args = parser.parse_args(argv)
    if args.gateway:
        return check_gateway()
    try:
        models = args.models or registered_models(args.management)
        states = {model: describe(args.management, model) for model in models}
    except requests.RequestException as exc:
        print(f"{args.management} does not answer: {type(exc).__name__}")
        return 1
    if not states:
        print("no model is registered")
        return 1
    healthy = True
    for model, state in states.items():
        failure = ""
        if is_ready(state):
            address = args.predictions.removeprefix("http://")
            failure = ask_prediction(address, model, TIMEOUT_SECONDS)
        healthy = healthy and is_ready(state) and not failure
        print(f"{model}: {summary(state)}" + (f", {failure}" if failure else ""))
    return 0 if healthy else 1


def check_gateway() -> int:
    """0 where the gateway says that all models are ready."""
    try:
        url = f"{GatewaySettings.load().url}/health"
        # On loopback, under whatever name its certificate has.
        response = get(url, timeout=TIMEOUT_SECONDS, verify=False)
    except SetupError as exc:
        print(exc)
        return 1
    except requests.RequestException as exc:
        print(f"{url} does not answer: {type(exc).__name__}")
        return 1
    print(response.text)
    return 0 if response.ok else 1


def registered_models(management: str) -> list[str]:
    """Names of the models that TorchServe knows. Raises requests.RequestException."""
    names: list[str] = []
    page = ""
    while True:
        response = get(f"{management}/models{page}", timeout=TIMEOUT_SECONDS)
        response.raise_for_status()
        content = response.json()
        names += [model["modelName"] for model in content["models"]]
        if "nextPageToken" not in content:
            return names
        page = f"?next_page_token={content['nextPageToken']}"


def describe(
    management: str, model: str, query: str = "", timeout: float = TIMEOUT_SECONDS
) -> dict[str, Any] | None:
    """TorchServe's description of a model's default version; None where it is not registered.

    Raises requests.RequestException.
    """
    response = get(f"{management}/models/{model}{query}", timeout=timeout)
    if response.status_code == 404:
        return None
    response.raise_for_status()
    return dict(response.json()[0])


def ready_workers(state: dict[str, Any]) -> int:
    return sum(worker["status"] == "READY" for worker in state["workers"])


def is_ready(state: dict[str, Any] | None) -> bool:
    """Whether as many workers are READY as the model should have, and at least one."""
    return state is not None and ready_workers(state) >= max(1, state["minWorkers"])


def summary(state: dict[str, Any] | None) -> str:
    if state is None:
        return "not registered"
    return f"{ready_workers(state)} of {state['minWorkers']} workers READY"
