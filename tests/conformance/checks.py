"""What a check is, and what it found. The clients' environments import this: no packages."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

# Where the specifications say what the checks test.
V1 = "kserve.github.io: V1 Protocol"
REST = "kserve/open-inference-protocol: inference_rest.md"
REST_SCHEMA = "kserve/open-inference-protocol: open_inference_rest.yaml"
GRPC = "kserve/open-inference-protocol: open_inference_grpc.proto"
READINESS = "kserve/kserve: docs/predict-api/v2/required_api.md"
BINARY = "triton-inference-server/server: extension_binary_data.md"
CLASSIFICATION = "triton-inference-server/server: extension_classification.md"
STATUS = "grpc/grpc: doc/statuscodes.md"
HEALTH = "grpc/grpc: doc/health-checking.md"
REFLECTION = "grpc/grpc: doc/server-reflection.md"
KIT = "this kit"

PASS, FAIL, NOT_OFFERED = "pass", "fail", "not offered"

Json = dict[str, Any]


class NotOffered(Exception):
    """The server does not have what a check tests, and need not have it."""


class Wrong(Exception):
    """The server does not do what the specification says; the message says what it did."""


def expect(condition: object, seen: str) -> None:
    if not condition:
        raise Wrong(seen)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The server under test, and what it says of its model. URLs have no slash at the end."""

    url: str
    model: str
    grpc: str | None = None  # host:port
    version: str | None = None  # the first that the metadata names
    inputs: tuple[Json, ...] = ()  # as in the model's metadata
    outputs: tuple[Json, ...] = ()
    extensions: tuple[str, ...] = ()
    binary: bool = False  # a request with binary data was answered, announced or not
    images: tuple[str, ...] = ()  # base64, if the model takes encoded images

    def needs_grpc(self) -> str:
        if self.grpc is None:
            raise NotOffered("no --grpc HOST:PORT was given")
        return self.grpc

    def needs_inputs(self) -> tuple[Json, ...]:
        """The model's inputs; without them no request can be made."""
        if not self.inputs:
            raise Wrong("the model's metadata names no inputs, so nothing can be sent")
        return self.inputs

    def needs_version(self) -> str:
        if self.version is None:
            raise NotOffered("the model's metadata names no versions")
        return self.version

    def needs_binary(self) -> None:
        if not (self.binary or "binary_tensor_data" in self.extensions):
            raise NotOffered("binary data is neither announced nor answered")

    def needs_classification(self) -> str:
        """An output of scores, of which classes can be asked for."""
        if "classification" not in self.extensions:
            raise NotOffered("classification is not among the server's extensions")
        scores = [tensor for tensor in self.outputs if tensor["datatype"].startswith("FP")]
        expect(scores, "no output of floating point numbers to classify")
        return str(scores[-1]["name"])


@dataclass(frozen=True, kw_only=True)
class Result:
    """One check's outcome; `states` is what the specification says, `seen` what was found."""

    protocol: str  # V1, V2 REST or V2 gRPC
    name: str
    client: str
    states: str
    source: str
    outcome: str = PASS
    seen: str = ""


@dataclass(frozen=True)
class Check:
    about: Result
    run: Callable[[Subject], None]


class Checks:
    """The checks of one client, in the order in which they are written."""

    def __init__(self, client: str) -> None:
        self.client = client
        self.checks: list[Check] = []
        self.answers: dict[str, list[Json]] = {}  # by the way they came; outputs of each image

    def check(
        self, protocol: str, name: str, states: str, source: str
    ) -> Callable[[Callable[[Subject], None]], Callable[[Subject], None]]:
        def add(function: Callable[[Subject], None]) -> Callable[[Subject], None]:
            about = Result(
                protocol=protocol, name=name, client=self.client, states=states, source=source
            )
            self.checks.append(Check(about, function))
            return function

        return add

    def run(self, subject: Subject) -> Iterator[Result]:
        for check in self.checks:
            yield outcome_of(check, subject)

    def main(self) -> int:
        """Check the subject on stdin; a JSON line for each result, then one with the answers."""
        subject = Subject(**json.load(sys.stdin))
        for result in self.run(subject):
            print(json.dumps(asdict(result)), flush=True)
        print(json.dumps(self.answers), flush=True)
        return 0


def outcome_of(check: Check, subject: Subject) -> Result:
    try:
        check.run(subject)
    except NotOffered as exc:
        return replace(check.about, outcome=NOT_OFFERED, seen=str(exc))
    except Wrong as exc:
        return replace(check.about, outcome=FAIL, seen=str(exc))
    except Exception as exc:  # the client's own: it could not make sense of the answer
        line = " ".join(f"{type(exc).__name__}: {exc}".split())
        return replace(check.about, outcome=FAIL, seen=line[:300])
    return check.about


def differences(first: Json, second: Json) -> list[str]:
    """What differs between two answers: names of outputs, their datatype, shape or a value.

    The second may have more outputs: some clients have to name those that they want. Values are
    flat lists; numbers are the same within 1e-6 of their size or of 1.
    """
    found = [f"{name} is missing" for name in sorted(first.keys() - second.keys())]
    for name in sorted(first.keys() & second.keys()):
        one, other = first[name], second[name]
        for field in ("datatype", "shape"):
            if one[field] != other[field]:
                found.append(f"{field} of {name}: {one[field]} and {other[field]}")
        if len(one["data"]) != len(other["data"]) or not all(
            map(_same, one["data"], other["data"])
        ):
            found.append(f"data of {name}: {_short(one['data'])} and {_short(other['data'])}")
    return found


def flat(data: Any) -> list[Any]:
    """Nested lists of a tensor's elements, row after row."""
    if not isinstance(data, list):
        return [data]
    return [element for row in data for element in flat(row)]


def _same(one: object, other: object) -> bool:
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return abs(one - other) <= 1e-6 * max(1.0, abs(one))
    return one == other


def _short(data: Sequence[object]) -> str:
    return str(data[:3])[:80]
