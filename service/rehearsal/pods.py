"""A pod as a real process, started, probed and ended by the rules of the kubelet.

https://kubernetes.io/docs/concepts/workloads/pods/pod-lifecycle/
"""

import asyncio
import os
import re
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from handler.errors import SetupError
from service.chaos.cluster import Unit, clean_environ
from service.rehearsal.manifests import Deployment, Object
from service.torchserve.config import ROOT

PORT, MANAGEMENT, METRICS = 8080, 8081, 8082  # of a replica
LOOK_SECONDS = 1.0  # after which the kubelet notices that a container has ended (its relist)
BACK_OFF_SECONDS = (10.0, 300.0)  # before the second restart, doubled until the longest
LEAST_GRACE_SECONDS = 2.0  # what a hook leaves for SIGTERM, however long it took


class Pod:
    """One pod of a revision of its Deployment's template; it lives until it is deleted."""

    def __init__(
        self, spec: Deployment, revision: int, ip: str, unit: Unit, session: aiohttp.ClientSession
    ) -> None:
        self.spec, self.revision, self.ip = spec, revision, ip
        self.unit = unit
        self._session = session
        self.ready_since: float | None = None  # monotonic; None: it is not ready
        self.restarts = 0
        self.killed = False  # its grace period was too short
        self.deleted = asyncio.Event()  # from then on it is terminating
        self.life = asyncio.create_task(self._live())

    @property
    def is_ready(self) -> bool:
        """Whether it is an endpoint."""
        return self.ready_since is not None and not self.deleted.is_set()

    @property
    def is_available(self) -> bool:
        least = self.spec.spec.get("minReadySeconds", 0)
        return self.is_ready and time.monotonic() - (self.ready_since or 0) >= least

    @property
    def scraped(self) -> str:
        """Where Prometheus finds its metrics."""
        return f"{self.ip}:{METRICS}"

    def kill(self) -> None:
        """SIGKILL to all its processes, as if memory had run out."""
        for process in [] if self.unit.has_ended() else self.unit.family():
            with suppress(psutil.Error):
                process.kill()

    async def _live(self) -> None:
        back_off = 0.0
        await first_of(self._initialise(), self.deleted.wait())
        while not self.deleted.is_set():
            self.unit.start()
            await first_of(self._end_of_container(), self._failed_probes(), self.deleted.wait())
            self.ready_since = None
            await self._end_container()
            if not self.deleted.is_set():
                self.restarts += 1
                await first_of(self.deleted.wait(), asyncio.sleep(back_off))
                back_off = min(max(BACK_OFF_SECONDS[0], 2 * back_off), BACK_OFF_SECONDS[1])

    async def _initialise(self) -> None:
        for command in self.spec.init:
            while not await self._run(command):
                await asyncio.sleep(BACK_OFF_SECONDS[0])

    async def _end_of_container(self, seconds: float = LOOK_SECONDS) -> None:
        while not self.unit.has_ended():
            await asyncio.sleep(seconds)

    async def _end_container(self) -> None:
        """The hook, SIGTERM, and SIGKILL when the grace period is over."""
        grace = self.spec.pod.get("terminationGracePeriodSeconds", 30)
        end = time.monotonic() + grace
        if not self.unit.has_ended():
            if hook := self.spec.container.get("lifecycle", {}).get("preStop"):
                await self._act(hook, grace)
            with suppress(psutil.Error):
                self.unit.process.terminate()
            left = max(LEAST_GRACE_SECONDS, end - time.monotonic())
            try:
                await asyncio.wait_for(self._end_of_container(0.1), left)
            except asyncio.TimeoutError:
                self.killed = True
                self.kill()
        await asyncio.to_thread(self.unit.stop)  # and what it has left behind

    async def _failed_probes(self) -> None:
        """Returns when the container has to be restarted."""
        if await self._watch("startupProbe", lambda _: True):
            await first_of(
                self._watch("livenessProbe", lambda passed: not passed),
                self._watch("readinessProbe", self._note_readiness),
            )

    def _note_readiness(self, passed: bool) -> bool:
        self.ready_since = (self.ready_since or time.monotonic()) if passed else None
        return False

    async def _watch(self, name: str, is_over: Callable[[bool], bool]) -> bool:
        """Probe until a result that came often enough in a row means that it is over.

        Without the probe it always passes.
        """
        probe = self.spec.container.get(name) or {"sleep": {"seconds": 0}}
        await asyncio.sleep(probe.get("initialDelaySeconds", 0))
        last, count = True, 0
        while True:
            passed = await self._act(probe, probe.get("timeoutSeconds", 1))
            last, count = passed, (count + 1 if passed == last else 1)
            enough = (
                probe.get("successThreshold", 1) if passed else probe.get("failureThreshold", 3)
            )
            if count >= enough and is_over(passed):
                return passed
            await asyncio.sleep(probe.get("periodSeconds", 10))

    async def _act(self, action: Object, seconds: float) -> bool:
        """Whether a probe or a hook succeeds in time."""
        try:
            return await asyncio.wait_for(self._do(action), seconds)
        except (asyncio.TimeoutError, aiohttp.ClientError, OSError):
            return False

    async def _do(self, action: Object) -> bool:
        if "exec" in action:
            return await self._run(action["exec"]["command"])
        if "sleep" in action:
            await asyncio.sleep(action["sleep"]["seconds"])
            return True
        if "httpGet" not in action:
            raise SetupError(f"a probe or hook must be httpGet, exec or sleep, got {dict(action)}")
        asked = action["httpGet"]
        url = f"http://{self.ip}:{self.spec.port(asked['port'])}{asked.get('path', '/')}"
        async with self._session.get(url, allow_redirects=False) as answer:
            return 200 <= answer.status < 400

    async def _run(self, command: Sequence[str]) -> bool:
        process = await asyncio.create_subprocess_exec(
            *command_here(command, self.ip),
            env=self.unit.environ,
            cwd=ROOT,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            return await process.wait() == 0
        finally:
            with suppress(ProcessLookupError):
                process.kill()


async def first_of(*coroutines: Coroutine[Any, Any, object]) -> None:
    """Wait for the first to return, and cancel the others; what it raises is raised."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


def unit_of(spec: Deployment, number: int, ip: str, archive: Path) -> Unit:
    """The process that stands for a container; its folder is beside the archive."""
    folder = archive.parent / f"{spec.name}-{number}"
    (folder / "tmp").mkdir(parents=True)
    for path in (archive.parent, folder, folder / "tmp"):
        path.chmod(0o755)  # nginx's workers are nobody's
    command = command_here(spec.command, ip)
    programs = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    environ = clean_environ() | {key: at_address(value, ip) for key, value in spec.environ.items()}
    environ |= {"TMPDIR": str(folder / "tmp"), "PATH": os.pathsep.join(programs)}
    if "scripts/gateway.py" in spec.command:
        environ |= {"GATEWAY_HOST": ip, "GATEWAY_KEYS": "off", "GATEWAY_MODELS": archive.stem}
    else:
        command = [word for word in command if not word.startswith("--archive=")]
        command += [f"--archive={archive}", "--require-signed=off"]
        if not any(word.startswith("--workers") for word in command):
            command.append(f"--workers={spec.cpus}")  # as many as its limit has cores
        environ |= {  # TorchServe's own are on loopback, which a pod has to itself
            "TS_INFERENCE_ADDRESS": f"http://{ip}:{PORT}",
            "TS_MANAGEMENT_ADDRESS": f"http://{ip}:{MANAGEMENT}",
            "TS_METRICS_ADDRESS": f"http://{ip}:{METRICS}",
            "TS_GRPC_INFERENCE_ADDRESS": ip,
            "TS_GRPC_MANAGEMENT_ADDRESS": ip,
        }
    return Unit(number, command, environ, [], folder)


def command_here(command: Sequence[str], ip: str) -> list[str]:
    """A container's command with our Python, our checkout, and its pod's address."""
    program, *words = command
    found = [sys.executable if program in ("python", "python3") else program]
    found += [str(ROOT / word) if word.startswith("scripts/") else word for word in words]
    if "scripts/healthcheck.py" in words and "--gateway" not in words:  # its defaults: loopback
        found += [f"--management=http://{ip}:{MANAGEMENT}", f"--predictions=http://{ip}:{PORT}"]
    return [at_address(word, ip) for word in found]


def at_address(text: str, ip: str) -> str:
    """A pod has its loopback and all its addresses to itself; here they are one of loopback."""
    return re.sub(r"(?<![\d.])(0\.0\.0\.0|127\.0\.0\.1)(?![\d.])", ip, text)
