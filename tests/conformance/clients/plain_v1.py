"""V1 in plain HTTP: what no client's library can send, and what it would hide."""

import sys
from collections.abc import Callable
from typing import Any

import requests

from tests.conformance.checks import V1, Checks, NotOffered, Subject, expect
from tests.conformance.clients.http import CLIENT, UNKNOWN, answered, get, post, refused

checks = Checks(CLIENT)
check = checks.check
OLD = "V1"


def needs_v1(subject: Subject) -> None:
    paths = ("/v1/models", f"/v1/models/{subject.model}")
    if all(get(subject, path).status_code in (404, 405, 501) for path in paths):
        raise NotOffered(f"there is nothing at {' and '.join(paths)}")


def instances(subject: Subject, number: int = 1) -> list[Any]:
    if not subject.images:
        raise NotOffered("V1 has no metadata to make an instance from; images need --image")
    return [{"b64": subject.images[i % len(subject.images)]} for i in range(number)]


def predict(subject: Subject, body: Any, model: str | None = None) -> requests.Response:
    return post(subject, f"/v1/models/{model or subject.model}:predict", body)


@check(OLD, "list of models", "GET /v1/models names the models under `models`.", V1)
def list_of_models(subject: Subject) -> None:
    needs_v1(subject)
    models = answered(get(subject, "/v1/models")).get("models")
    expect(isinstance(models, list) and subject.model in models, f"models: {models}")


@check(OLD, "model ready", "GET /v1/models/M gives `name` and `ready`.", V1)
def model_ready(subject: Subject) -> None:
    needs_v1(subject)
    content = answered(get(subject, f"/v1/models/{subject.model}"))
    expect(content.get("name") == subject.model, f"name: {content.get('name')}")
    expect(content.get("ready") is True, f"ready: {content.get('ready')!r}")


@check(OLD, "unknown model: ready", "A model that is not there is not ready.", V1)
def v1_unknown_model(subject: Subject) -> None:
    needs_v1(subject)
    refused(get(subject, f"/v1/models/{UNKNOWN}"), 404)


@check(OLD, "predictions", "POST :predict gives `predictions`, one for each instance.", V1)
def predictions(subject: Subject) -> None:
    needs_v1(subject)
    for number in (1, 2):
        sent = {"instances": instances(subject, number)}
        found = answered(predict(subject, sent)).get("predictions")
        expect(isinstance(found, list) and len(found) == number, f"{number}: {str(found)[:100]}")


@check(
    OLD,
    "forms of base64",
    'Bytes are {"b64": base64}, alone or as a named input (TensorFlow Serving\'s REST API).',
    V1,
)
def forms_of_base64(subject: Subject) -> None:
    needs_v1(subject)
    [plain] = instances(subject)
    expected = answered(predict(subject, {"instances": [plain]}))
    for form in ({"image": plain}, {"image_bytes": plain}, plain["b64"]):
        found = answered(predict(subject, {"instances": [form]}))
        same = found.get("predictions") and found == expected
        expect(same, f"{str(form)[:30]} gives another prediction")


def v1_mistake(name: str, make: Callable[[Subject], Any], model: str | None = None) -> None:
    @check(OLD, name, "A mistake of the client's is a 4xx with the text under `error`.", V1)
    def refusal(subject: Subject) -> None:
        needs_v1(subject)
        refused(predict(subject, make(subject), model))


v1_mistake("unknown model: predict", lambda subject: {"instances": [{"b64": ""}]}, UNKNOWN)
v1_mistake("broken JSON", lambda subject: b'{"instances": [')
v1_mistake("no instances", lambda subject: {"images": []})
v1_mistake("instances that are no list", lambda subject: {"instances": "x"})

if __name__ == "__main__":
    sys.exit(checks.main())
