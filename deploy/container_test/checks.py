"""What has to hold for the image and for a container of it."""

import json
import os
import re
from collections import Counter
from pathlib import Path

from container_test.commands import check, run, say, wait_until
from container_test.container import EXAMPLE, NAME, READY_SECONDS, Container, inspect, is_worker
from container_test.load import stop_under_load

# What only CUDA's build of torch has, in site-packages.
CUDA_ONLY = (
    "nvidia nvidia_* cuda cuda_* triton triton-* torch/lib/libtorch_cuda* torch/lib/libc10_cuda*"
    " torch/lib/libcaffe2_nvrtc* torch/lib/libtorch_nvshmem*"
)


def examine(folder: Path, image: str, stops: int, clients: int) -> dict[str, object]:
    """All checks of an image; gives what was measured on the way."""
    facts = look_at_files(image)
    keys = folder / "keys"
    alone = ("podman", "run", "--rm", "--network=none")
    made = run(*alone, image, "scripts/gateway.py", "--new-key=test")
    key, line = (text.split(":")[1].strip() for text in made.splitlines())
    keys.write_text(f"{line}\n")
    keys.chmod(0o644)

    container = Container.start(image, keys, key)
    facts |= look_at_running(container)
    container.stop()

    container = Container.start(image, keys, key, "--env=CLASSIFIER_ENGINE=torch")
    engine = container.predict()["metadata"]["engine"]
    check("torch in place of OpenVINO", engine.startswith("torch"), engine)
    container.stop()

    container = Container.start(image, keys, key, read_only=False)
    container.predict()
    container.stop(remove=False)
    layer = Path(inspect("GraphDriver.Data.UpperDir"))
    # Besides /tmp: mount points, and files that podman makes.
    ours = {"dev", "etc", "proc", "run", "sys", "tmp"}
    changed = [path.name for path in layer.iterdir() if path.name not in ours]
    check("nothing is written outside /tmp where it could be", not changed, changed)
    run("podman", "rm", NAME)

    total = Counter[str]()
    seconds = []
    for number in range(1, stops + 1):
        container = Container.start(image, keys, key)
        outcomes, took = stop_under_load(container, clients)
        say(f"stop {number}", f"{took:.1f} s  {dict(outcomes)}")
        total += outcomes
        seconds.append(took)
    check("no accepted request without an answer", not total["lost"], dict(total))
    return facts | {
        "stops": stops,
        "clients": clients,
        "requests": dict(total),
        "stop_seconds_max": round(max(seconds, default=0), 1),
    }


def look_at_files(image: str) -> dict[str, object]:
    """No build tools and nothing writable in the image; its sizes in bytes."""
    inspected = json.loads(run("podman", "image", "inspect", image))[0]
    size = inspected["Size"]
    say("size", f"{size / 1e9:.2f} GB")
    script = f"""
        for name in pip pip3 cc gcc g++ c++ clang make ld; do command -v $name; done
        find / -xdev -name pip -path '*-packages*' -o -xdev -path '*/apt/lists/*_Packages'
        find /app -xdev -writable
        echo --- && cd /app/.venv/lib/python3*/site-packages
        du --apparent-size --block-size=1 --total --summarize {CUDA_ONLY} 2>/dev/null | tail -1
    """
    shell = ("podman", "run", "--rm", "--network=none", "--entrypoint=sh", image, "-c")
    found, cuda = run(*shell, script, check=False).split("---")
    what = "no pip, no compiler, no package lists, nothing of /app writable"
    check(what, not found.split(), found)
    cuda_bytes = int(cuda.split()[0])
    estimate = size - cuda_bytes
    if cuda_bytes > 1e9:
        say("size with TORCH=cpu", f"{estimate / 1e9:.2f} GB, estimated: less what only CUDA needs")
    is_estimate = cuda_bytes > 1e9
    return {"size_bytes": size, "cpu_size_bytes": estimate, "cpu_size_is_estimate": is_estimate}


def look_at_running(container: Container) -> dict[str, object]:
    """Health, an answer, no rights, and a killed worker; seconds and MiB."""
    say("ready", f"{container.ready_seconds:.1f} s after podman run")
    health = run("podman", "healthcheck", "run", NAME, check=False)
    check("HEALTHCHECK", inspect("State.Health.Status") == "healthy", health)
    answer = container.predict()
    best, weights = answer["predictions"][0], answer["metadata"]["weights"]
    say("prediction", f"{best['class']} {best['confidence']}, weights {weights}")
    status, body = container.ask("POST", "/predict", EXAMPLE.read_bytes())
    check("without a key 401", status == 401, body)

    processes = container.processes()
    users = {name for status in processes.values() for name in status["Uid"].split()}
    check("no process of root's", users == {"1000"}, users)
    rights = {status["CapEff"] for status in processes.values()}
    check("no capabilities", {int(mask, 16) for mask in rights} == {0}, rights)
    maps = [Path(f"/proc/{pid}/maps").read_text() for pid in processes]
    check("Java uses its class archive", any("java-classes.jsa" in text for text in maps), "maps")
    memory = sum(map(resident_kib, processes))
    files = container.shell("du --summarize --block-size=1K /tmp")
    say("memory", f"{memory / 1024:.0f} MiB in {len(processes)} processes, idle")
    say("files in /tmp", f"{int(files.split()[0]) / 1024:.0f} MiB")

    written = container.shell("touch /app/a /run/a /var/a /a; ls /app/a /run/a /var/a /a")
    check("nothing but /tmp can be written", not written, written)

    os.kill(next(filter(is_worker, processes)), 9)

    def is_back() -> bool:
        fresh = container.processes().keys() - processes.keys()
        return any(map(is_worker, fresh)) and container.is_healthy()

    wait_until(is_back, READY_SECONDS, "a killed worker does not come back")
    found = container.processes().values()
    zombies = [status["Name"] for status in found if status["State"].startswith("Z")]
    check("a killed worker comes back and leaves no zombie", not zombies, zombies)
    return {
        "ready_seconds": round(container.ready_seconds, 1),
        "memory_mib": round(memory / 1024),
        "processes": len(processes),
    }


def resident_kib(pid: int) -> int:
    """Memory of a process, with its share of what it has in common with others (PSS)."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(map(int, re.findall(r"^Pss:\s+(\d+)", text, re.MULTILINE)))
