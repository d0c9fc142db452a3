"""The requests of a campaign: every form and route, what is wrong with some, and what is right."""

import base64
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from service.load.answers import read_predictions
from service.load.images import BOUNDARY

FORM = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
HUGE_BYTES = 17 * 2**20  # more than the gateway takes
OK = (200,)


@dataclass(frozen=True)
class Picture:
    """An encoded image and the class that it is of."""

    body: bytes
    right: str


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request as it is sent, and the answers of which one is right."""

    form: str
    target: str
    method: str = "POST"
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    statuses: tuple[int, ...] = OK  # none: the client hangs up
    right: str = ""  # see Attempt
    seconds: float = 0  # over which the body is sent
    share: float = 1  # of the body, after which the client hangs up
    has_key: bool = True


def part(name: str, body: bytes, filename: str = "") -> bytes:
    named = f'; filename="{filename}"' if filename else ""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'
    return head.encode() + body + b"\r\n"


END = f"--{BOUNDARY}--\r\n".encode()


@dataclass
class Mixture:
    """Makes requests of all kinds, as a generator of random numbers decides."""

    model: str
    pictures: Sequence[Picture]
    large: Picture  # of many pixels, and within the limits

    def draw(self, rng: random.Random, number: int) -> Request:
        """The next request; `number` is its own."""
        [make] = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))
        return make(self, rng, number)

    def raw(self, rng: random.Random, number: int) -> Request:
        picture = rng.choice(self.pictures)
        # What follows the end of an image is ignored; the body is new to every cache.
        body = picture.body + f"{number}".encode()
        return Request(form="raw", target="/predict", body=body, right=picture.right)

    def crowded(self, rng: random.Random, number: int) -> Request:
        return replace(self.raw(rng, number), form="crowd", statuses=(200, 429, 503))

    def many_pixels(self, rng: random.Random, number: int) -> Request:
        body, right = self.large.body + f"{number}".encode(), self.large.right
        return replace(self.raw(rng, number), form="many pixels", body=body, right=right)

    def named_route(self, rng: random.Random, number: int) -> Request:
        target = f"/predictions/{self.model}"
        return replace(self.raw(rng, number), form="named route", target=target, method="PUT")

    def old_route(self, rng: random.Random, number: int) -> Request:
        target = f"/{self.model}/predict?top_k=2"
        return replace(self.raw(rng, number), form="old route", target=target)

    def multipart(self, rng: random.Random, number: int) -> Request:
        picture, name = rng.choice(self.pictures), f"{number}.jpg"
        body = part("file", picture.body, name) + part("top_k", b"1") + END
        right = f"{picture.right} {name}"
        return Request(form="form", target="/predict", headers=FORM, body=body, right=right)

    def batch(self, rng: random.Random, number: int) -> Request:
        pictures, names = rng.sample(self.pictures, 3), [f"{number}-{i}.jpg" for i in range(3)]
        parts = [
            part(f"file{i}", picture.body, name)
            for i, (picture, name) in enumerate(zip(pictures, names, strict=True))
        ]
        pairs = zip(pictures, names, strict=True)
        right = ", ".join(f"{picture.right} {name}" for picture, name in pairs)
        body = b"".join(parts) + END
        return Request(form="batch", target="/predict", headers=FORM, body=body, right=right)

    def as_json(self, rng: random.Random, number: int) -> Request:
        picture, name = rng.choice(self.pictures), f"{number}.jpg"
        image = base64.b64encode(picture.body).decode()
        return Request(
            form="JSON",
            target="/predict",
            headers={"Content-Type": "application/json"},
            body=json.dumps({"image": image, "filename": name}).encode(),
            right=f"{picture.right} {name}",
        )

    def slow(self, rng: random.Random, number: int) -> Request:
        seconds = rng.uniform(1, 4)
        return replace(self.multipart(rng, number), form="slow", seconds=seconds)

    def gone(self, rng: random.Random, number: int) -> Request:
        share = rng.choice((0.1, 0.5, 1.0))
        return replace(self.multipart(rng, number), form="gone", statuses=(), share=share)

    def no_image(self, rng: random.Random, _: int) -> Request:
        body = rng.choice((b"", b"no image", rng.choice(self.pictures).body[:200]))
        return Request(form="no image", target="/predict", body=body, statuses=(400,))

    def foreign(self, rng: random.Random, _: int) -> Request:
        body = rng.choice((b"%PDF-1.7\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>"))
        return Request(form="foreign format", target="/predict", body=body, statuses=(415,))

    def broken_form(self, rng: random.Random, number: int) -> Request:
        whole = self.multipart(rng, number)
        body = rng.choice(
            (
                whole.body[: -len(END)],
                whole.body.replace(BOUNDARY.encode(), b"another"),
                whole.body.replace(b'name="file"', b""),
                b"--" + BOUNDARY.encode() + b"\r\n" + b"X: " + b"y" * 9000 + b"\r\n\r\nz" + END,
                b"",
            )
        )
        return replace(whole, form="broken form", body=body, statuses=(400,), right="")

    def broken_json(self, rng: random.Random, _: int) -> Request:
        body = rng.choice((b"{", b"[]", b'{"image": "no base64!"}', b'{"images": 3}'))
        headers = {"Content-Type": "application/json"}
        return Request(
            form="broken JSON", target="/predict", headers=headers, body=body, statuses=(400,)
        )

    def huge(self, rng: random.Random, _: int) -> Request:
        body = rng.choice(self.pictures).body
        body += bytes(HUGE_BYTES - len(body))
        return Request(form="huge", target="/predict", body=body, statuses=(413,))

    def bad_top_k(self, rng: random.Random, number: int) -> Request:
        bad = replace(self.raw(rng, number), form="bad top_k", statuses=(400,), right="")
        return replace(bad, target="/predict?top_k=none")

    def no_key(self, rng: random.Random, number: int) -> Request:
        refused = replace(self.raw(rng, number), form="no key", statuses=(401,), right="")
        return replace(refused, has_key=False)

    def unknown(self, rng: random.Random, number: int) -> Request:
        """TorchServe's own words for a model that it does not have are in the answer."""
        absent = replace(self.raw(rng, number), form="no model", statuses=(404,), right="")
        return replace(absent, target="/predictions/none")

    def page(self, rng: random.Random, _: int) -> Request:
        target = rng.choice(("/health", "/info", "/livez", "/openapi.json", "/", "/metrics"))
        return Request(form="page", target=target, method="GET")

    def no_page(self, rng: random.Random, _: int) -> Request:
        method, target, status = rng.choice(
            (("GET", "/predict", 405), ("GET", "/none", 404), ("POST", "/health", 405))
        )
        return Request(form="no page", target=target, method=method, statuses=(status,))


Make = Callable[[Mixture, random.Random, int], Request]

WEIGHTS: dict[Make, int] = {
    Mixture.raw: 20,
    Mixture.multipart: 20,
    Mixture.as_json: 10,
    Mixture.batch: 6,
    Mixture.named_route: 6,
    Mixture.old_route: 4,
    Mixture.slow: 3,
    Mixture.gone: 3,
    Mixture.page: 6,
    Mixture.no_page: 2,
    Mixture.no_image: 3,
    Mixture.foreign: 2,
    Mixture.broken_form: 3,
    Mixture.broken_json: 2,
    Mixture.bad_top_k: 2,
    Mixture.no_key: 2,
    Mixture.unknown: 1,
    Mixture.huge: 1,
    Mixture.many_pixels: 1,
}


def read_answer(body: bytes) -> tuple[str, str]:
    """What an answer says: its classes in the form of Attempt.right, and the type of an error."""
    try:
        document = json.loads(body)
    except ValueError:
        return "", ""
    if not isinstance(document, dict):
        return "", ""
    results = document.get("results", [document])
    answered = ", ".join(_read_result(result) for result in results if "predictions" in result)
    return answered, str(document.get("type", "") if document.get("message") else "")


def _read_result(result: Mapping[str, Any]) -> str:
    [(label, _), *_] = read_predictions(result)
    name = result["metadata"].get("filename")
    return f"{label} {name}" if name else label
