"""An API key and its hash, while everything runs that could give them away."""

import hashlib
import secrets
from pathlib import Path

import psutil
import requests

from tests.gateway.clients import RED, TIMEOUT
from tests.gateway.conftest import serving_with_gateway


def places(root: psutil.Process) -> dict[str, bytes]:
    """What others see of a process and those below it: command lines and environments."""
    found = {}
    for process in (root, *root.children(recursive=True)):
        who = f"{process.name()} {process.pid}"
        found[f"command of {who}"] = "\0".join(process.cmdline()).encode()
        found[f"environment of {who}"] = repr(process.environ()).encode()
    return found


def test_no_key_is_in_a_process_list_an_environment_a_file_or_the_log(
    tmp_path: Path, temporary: Path, colours: list[str], store: Path
) -> None:
    key = secrets.token_urlsafe(32)
    digest = hashlib.sha256(key.encode()).hexdigest()
    keys = tmp_path / "keys"
    keys.write_text(f"alice {digest}\n")
    variables = {"GATEWAY_KEYS": str(keys), "TMPDIR": str(temporary)}
    with serving_with_gateway(tmp_path, colours, store, **variables) as served:
        for headers in ({"X-API-Key": key}, {"Authorization": f"Bearer {key}"}):
            for body, status in ((RED, 200), (b"no image", 400)):
                answer = requests.post(
                    f"{served.url}/predict", data=body, headers=headers, timeout=TIMEOUT
                )
                assert answer.status_code == status
        found = places(psutil.Process(served.server.process.pid))
        names = " ".join(found)
        assert all(name in names for name in ("java", "nginx", "python")), names
        for path in temporary.rglob("*"):
            if path.is_file():
                found[str(path)] = path.read_bytes()
        assert any("weights.safetensors" in where for where in found)
    found["log"] = served.server.output.read_bytes()
    assert b"alice" in found["log"]  # who asked is written, and not with what
    for where, content in found.items():
        assert key.encode() not in content, where
        if where.startswith(("command", "environment", "log")):
            assert digest.encode() not in content, where
