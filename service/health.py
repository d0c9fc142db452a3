"""Whether the service can answer: what ./scripts/healthcheck asks.

TorchServe's own /ping says Healthy while models load, while workers crash, and without any model;
its workers say READY while every prediction fails.
"""

from collections.abc import Sequence
from contextlib import suppress

import requests

from handler.errors import SetupError
from service.client import no_answer
from service.gateway.settings import GatewaySettings
from service.gateway.watch import ask_prediction
from service.torchserve.management import Management, ModelState, UnknownModel, direct_session

TIMEOUT_SECONDS = 5


def check_models(management: str, predictions: str, models: Sequence[str]) -> tuple[bool, str]:
    """Whether each model has all its workers READY and answers a prediction; a line for each.

    `management` and `predictions` are http://HOST:PORT. A model is NAME, which is its default
    version, or NAME/VERSION. No models means every registered version, and at least one.
    """
    client, address = Management(management, TIMEOUT_SECONDS), predictions.removeprefix("http://")
    try:
        if models:
            states = {model: _describe(client, model) for model in models}
        else:
            states = _describe_all(client)
    except requests.RequestException as exc:
        return False, no_answer(management, exc)
    if not states:
        return False, "no model is registered"
    healthy, lines = True, []
    for model, state in states.items():
        if state is None:
            healthy = False
            lines.append(f"{model}: not registered")
            continue
        failure = ask_prediction(address, model, TIMEOUT_SECONDS) if state.is_ready else ""
        healthy = healthy and state.is_ready and not failure
        line = f"{model}: {state.ready} of {state.min_workers} workers READY"
        lines.append(f"{line}, {failure}" if failure else line)
    return healthy, "\n".join(lines)


def _describe(client: Management, model: str) -> ModelState | None:
    try:
        return client.describe(model)
    except UnknownModel:
        return None


def _describe_all(client: Management) -> dict[str, ModelState | None]:
    """All versions of all models; the only version of a model goes by the model's name."""
    states: dict[str, ModelState | None] = {}
    for model in client.models():
        with suppress(UnknownModel):  # it was unregistered meanwhile
            versions = client.describe_versions(model)
            for state in versions:
                name = model if len(versions) == 1 else f"{model}/{state.version}"
                states[name] = state
    return states


def check_gateway() -> tuple[bool, str]:
    """Whether the gateway that the GATEWAY_ variables describe says that all models are ready."""
    try:
        url = f"{GatewaySettings.load().url}/health"
        with direct_session() as session:
            # It is on loopback, whatever the name in its certificate.
            answer = session.get(url, timeout=TIMEOUT_SECONDS, verify=False)
    except SetupError as exc:
        return False, str(exc)
    except requests.RequestException as exc:
        return False, no_answer(url, exc, "./scripts/gateway")
    return answer.ok, answer.text.rstrip()
