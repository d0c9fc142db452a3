"""`buf curl`: a client that knows nothing of a service but what the server's reflection says."""

import base64
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.conformance.checks import (
    GRPC,
    HEALTH,
    REFLECTION,
    Checks,
    NotOffered,
    Subject,
    expect,
)
from tests.conformance.tensors import CONTENTS, elements, shape_of

checks = Checks(f"buf curl {version('buf-bin')}")
check = checks.check
NEW = "V2 gRPC"
SERVICE = "inference.GRPCInferenceService"
METHODS = "ServerLive ServerReady ModelReady ServerMetadata ModelMetadata ModelInfer".split()
BUF = Path(sys.executable).with_name("buf")
SECONDS = 60


def buf(subject: Subject, *words: str, path: str = "", data: Any = None) -> str:
    """What `buf curl` prints. Raises NotOffered if the server has no reflection."""
    url = f"http://{subject.needs_grpc()}{path}"
    command = [str(BUF), "curl", "--protocol", "grpc", "--http2-prior-knowledge", *words]
    if data is not None:
        command += ["--data", "@-"]
    done = subprocess.run(
        [*command, url],
        input=None if data is None else json.dumps(data),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    said = " ".join(done.stderr.split())
    if "unimplemented" in said or "failed to find service" in said:
        raise NotOffered("there is no reflection")
    expect(done.returncode == 0, f"status {done.returncode >> 3 or done.returncode}: {said[:200]}")
    return done.stdout


@check(NEW, "reflection: services", "The server lists its services.", REFLECTION)
def services(subject: Subject) -> None:
    found = buf(subject, "--list-services").split()
    expect(SERVICE in found, f"{found}")


@check(NEW, "reflection: methods", "The service has the six methods of the protocol.", GRPC)
def methods(subject: Subject) -> None:
    found = {line.rpartition("/")[2] for line in buf(subject, "--list-methods").split()}
    expect(set(METHODS) <= found, f"missing {sorted(set(METHODS) - found)}")


@check(NEW, "reflection: ServerLive", "`live` is true.", GRPC)
def live(subject: Subject) -> None:
    found = json.loads(buf(subject, path=f"/{SERVICE}/ServerLive", data={}))
    expect(found.get("live") is True, f"{found}")


@check(NEW, "reflection: ModelInfer", "Typed contents, as JSON writes them.", GRPC)
def infer(subject: Subject) -> None:
    subject.needs_grpc()
    inputs = []
    for tensor in subject.needs_inputs():
        kind = CONTENTS[tensor["datatype"]]
        values = elements(subject, tensor)
        if kind == "bytes":
            values = [base64.b64encode(value).decode() for value in values]
        described = {"name": tensor["name"], "datatype": tensor["datatype"]}
        contents = {f"{kind}_contents": values}
        inputs.append(described | {"shape": shape_of(tensor), "contents": contents})
    sent = {"model_name": subject.model, "id": "a-1", "inputs": inputs}
    found = json.loads(buf(subject, path=f"/{SERVICE}/ModelInfer", data=sent))
    expect(found.get("outputs"), f"{str(found)[:150]}")
    expect(found.get("id") == "a-1", f"id {found.get('id')!r}")


@check(NEW, "reflection: health", "grpc.health.v1.Health/Check is SERVING.", HEALTH)
def health(subject: Subject) -> None:
    if "grpc.health.v1.Health" not in buf(subject, "--list-services").split():
        raise NotOffered("grpc.health.v1.Health is not among the services")
    found = json.loads(buf(subject, path="/grpc.health.v1.Health/Check", data={}))
    expect(found.get("status") == "SERVING", f"{found}")


if __name__ == "__main__":
    sys.exit(checks.main())
