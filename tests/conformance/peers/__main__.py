"""Run the kit against other servers on loopback, and print the table of docs/protocols.md.

    python -m tests.conformance.peers [kserve] [mlserver]

With one name, its failures are listed.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.conformance.checks import FAIL, NOT_OFFERED, Result, Subject
from tests.conformance.environments import ROOT, prepare
from tests.conformance.kit import NoServer, examine, run

START_SECONDS = 60
MODEL = "toy"


def free_ports(number: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def command(name: str, folder: Path, ports: Sequence[int]) -> list[str]:
    python = prepare(name)
    http_port, grpc_port, metrics_port = ports
    if name == "kserve":
        module = "tests.conformance.peers.kserve_server"
        return [str(python), "-m", module, str(http_port), str(grpc_port)]
    server = {
        "host": "127.0.0.1",
        "http_port": http_port,
        "grpc_port": grpc_port,
        "metrics_port": metrics_port,
        "parallel_workers": 0,
        "cache_enabled": False,
    }
    model = {"name": MODEL, "implementation": "tests.conformance.peers.mlserver_model.Toy"}
    (folder / "settings.json").write_text(json.dumps(server))
    (folder / "model-settings.json").write_text(json.dumps(model))
    return [str(python.with_name("mlserver")), "start", str(folder)]


@contextmanager
def serving(name: str) -> Iterator[Subject]:
    """A peer with the toy model, until it is ended."""
    with TemporaryDirectory() as folder, (Path(folder) / "log").open("w+") as log:
        ports = free_ports(3)
        process = subprocess.Popen(
            command(name, Path(folder), ports),
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            yield wait_for(process, ports, log.name)
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_for(process: subprocess.Popen[bytes], ports: Sequence[int], log: str) -> Subject:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            subject = examine(
                f"http://127.0.0.1:{ports[0]}", MODEL, grpc=f"127.0.0.1:{ports[1]}", images=()
            )
            if subject.inputs:
                return subject
        except NoServer:
            pass
        time.sleep(0.3)
    raise SystemExit(f"the server did not start:\n{Path(log).read_text()[-3000:]}")


def main(names: Sequence[str]) -> int:
    found: dict[str, list[Result]] = {}
    for name in names or ("kserve", "mlserver"):
        with serving(name) as subject:
            found[name] = list(run(subject))
    for name, results in found.items():
        print(f"\n{name}")
        for result in results:
            if result.outcome in (FAIL, NOT_OFFERED):
                print(
                    f"{result.outcome:11}  {result.protocol:7}  {result.client:28}  "
                    f"{result.name}: {result.seen}"
                )
        print(
            {
                outcome: sum(each.outcome == outcome for each in results)
                for outcome in ("pass", FAIL, NOT_OFFERED)
            }
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
