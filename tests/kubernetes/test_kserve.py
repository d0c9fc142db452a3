"""deploy/kserve against KServe's own model classes, and against the code."""

import json
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

from service.gateway.process import MAX_STOP_SECONDS
from service.gateway.settings import GatewaySettings
from service.options import parse_serve
from service.serving import READY_SECONDS
from service.torchserve.server import READ_SECONDS, STOP_SECONDS
from tests import ROOT, skip
from tests.container.known import check_variables
from tests.kubernetes.rendered import container, of_kind, release

HERE = Path(__file__).parent
RUNTIME, CPU, GPU = (
    yaml.safe_load((ROOT / "deploy" / "kserve" / f"{name}.yaml").read_text())
    for name in ("runtime", "cpu", "gpu")
)
(CONTAINER,) = RUNTIME["spec"]["containers"]
GATEWAY_STOP = MAX_STOP_SECONDS + 5


def planted(one: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    changed: dict[str, Any] = deepcopy(one)
    place: Any = changed
    *way, last = path.split("/")
    for word in way:
        place = place[int(word) if word.isdigit() else word]
    place[last] = value
    return changed


def test_kserve_takes_every_object_and_no_mistake() -> None:
    mistakes = [
        planted(CPU, "spec/predictor/canaryTrafficPercnt", 10),
        planted(CPU, "spec/predictor/canaryTrafficPercent", "ten"),
        planted(GPU, "spec/predictor/model/storageUrl", "oci://a"),
        planted(RUNTIME, "spec/containers/0/imagePullPolicies", "Always"),
    ]
    uv = str(Path(sys.executable).with_name("uv"))
    command = [uv, "run", "--no-project", "--python", sys.executable]
    command += ["--with-requirements", str(HERE / "requirements-kserve.txt")]
    command += [str(HERE / "kserve_models.py")]
    if sys.version_info >= (3, 14):
        skip("KServe's package is for Python 3.13 and older")
    done = subprocess.run(
        [*command, json.dumps([RUNTIME, CPU, GPU, *mistakes])],
        capture_output=True,
        text=True,
        check=False,
    )
    if "error sending request" in done.stderr:
        skip(f"no package registry answers: {done.stderr}")
    assert done.returncode == 0, done.stderr
    complaints = json.loads(done.stdout.splitlines()[-1])
    assert complaints[:3] == [[], [], []]
    assert all(complaints[3:])


def test_kubernetes_takes_the_pod() -> None:
    """What KServe hands on of the runtime, as a pod of its own."""
    spec = {"containers": [CONTAINER], "volumes": RUNTIME["spec"]["volumes"]}
    one = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": spec}
    kubernetes_validate.validate(one, kubernetes_validate.latest_version(), strict=True)


def test_the_runtime_is_that_of_the_code() -> None:
    script, *options = CONTAINER["args"]
    assert (ROOT / script).is_file()
    args = parse_serve(options + GPU["spec"]["predictor"]["model"]["args"])
    assert (args.archives, args.gateway, args.device) == (("/mnt/models",), True, "cuda")
    assert args.require_signed == "/run/signer/public.pem"
    environment = {one["name"]: one["value"] for one in CONTAINER["env"]}
    check_variables(environment)
    assert [port["containerPort"] for port in CONTAINER["ports"]] == [GatewaySettings.port]
    metrics = environment["TS_METRICS_ADDRESS"].rpartition(":")[2]
    assert RUNTIME["spec"]["annotations"]["prometheus.kserve.io/port"] == metrics
    assert {"v1", "v2", "grpc-v2"} == set(RUNTIME["spec"]["protocolVersions"])
    image = container(of_kind(release("default"), "Deployment")["replica"])["image"]
    assert CONTAINER["image"] == image


def test_the_container_has_no_rights_and_bounds() -> None:
    rights = container(of_kind(release("default"), "Deployment")["replica"])["securityContext"]
    assert rights.items() <= CONTAINER["securityContext"].items()
    assert CONTAINER["securityContext"]["runAsNonRoot"] is True
    assert CONTAINER["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert CONTAINER["resources"]["requests"] == CONTAINER["resources"]["limits"]
    for service in (CPU, GPU):
        assert service["spec"]["predictor"]["automountServiceAccountToken"] is False


def test_times_fit() -> None:
    liveness = CONTAINER["livenessProbe"]
    assert liveness["periodSeconds"] * liveness["failureThreshold"] >= READY_SECONDS
    response = {one["name"]: one["value"] for one in CONTAINER["env"]}[
        "GATEWAY_RESPONSE_TIMEOUT_SECONDS"
    ]
    assert int(response) <= MAX_STOP_SECONDS
    stop = GATEWAY_STOP + STOP_SECONDS + READ_SECONDS
    assert CPU["spec"]["predictor"]["timeout"] >= stop
    predictor = GPU["spec"]["predictor"]
    sleep = predictor["model"]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert predictor["terminationGracePeriodSeconds"] >= sleep + stop


def test_services_use_the_runtime_and_oci_images() -> None:
    formats = {one["name"] for one in RUNTIME["spec"]["supportedModelFormats"]}
    for service in (CPU, GPU):
        model = service["spec"]["predictor"]["model"]
        assert model["runtime"] == RUNTIME["metadata"]["name"]
        assert model["modelFormat"]["name"] in formats
        assert model["protocolVersion"] in RUNTIME["spec"]["protocolVersions"]
        assert re.fullmatch(r"oci://[\w./-]+:[\w.-]+", model["storageUri"])
    assert "canaryTrafficPercent" not in GPU["spec"]["predictor"]  # Knative's alone
