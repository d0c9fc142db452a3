"""The parts of a cluster that put pods in and out: Deployments, evictions, names, autoscaling."""

import asyncio
import contextlib
import itertools
import math
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import requests

from handler.errors import SetupError
from service.chaos.cluster import has_own_mounts, run_tool
from service.chaos.prometheus import Prometheus, write_targets
from service.rehearsal.autoscaler import SYNC_SECONDS, Autoscaler
from service.rehearsal.manifests import Deployment, Manifests
from service.rehearsal.pods import Pod, unit_of

TICK_SECONDS = 0.2  # between two looks of the controllers
EVICT_SECONDS = 5.0  # after which kubectl drain asks again
JOB = "classifier"  # Prometheus' name for the replicas
SETTLE_SECONDS = 600.0  # in which any change must be over


class Workload:
    """A Deployment: keeps as many pods of its newest revision as it should have."""

    def __init__(self, spec: Deployment, cluster: "Cluster") -> None:
        self._spec, self._cluster = spec, cluster
        self.desired: int = spec.spec.get("replicas", 1)
        self.revision = 1
        self.pods: list[Pod] = []

    def reconcile(self) -> None:
        """One step of a rolling update, or of scaling; it is none if nothing is to be done."""
        for pod in [pod for pod in self.pods if pod.life.done()]:
            pod.life.result()
            self.pods.remove(pod)
        living = [pod for pod in self.pods if not pod.deleted.is_set()]
        new = [pod for pod in living if pod.revision == self.revision]
        old = [pod for pod in living if pod.revision != self.revision]
        least, most = self._spec.bounds(self.desired)
        for _ in range(min(self.desired - len(new), most - len(living))):
            self.pods.append(self._cluster.start_pod(self._spec, self.revision))
        # Those that are not ready, or not for long, go first.
        new.sort(key=lambda pod: pod.ready_since or math.inf, reverse=True)
        for pod in new[: max(0, len(new) - self.desired)]:
            pod.deleted.set()
        spare = sum(pod.is_available for pod in living) - least
        for pod in sorted(old, key=lambda pod: pod.is_available):
            spare -= pod.is_available
            if spare >= 0:
                pod.deleted.set()

    def is_settled(self) -> bool:
        """Whether all its pods are of the newest revision and available, and no other is left."""
        return len(self.pods) == self.desired and all(
            pod.revision == self.revision and pod.is_available for pod in self.pods
        )

    def ready(self) -> list[Pod]:
        return [pod for pod in self.pods if pod.is_ready]


class Cluster:
    """The pods of some manifests, on loopback addresses of their own."""

    def __init__(
        self,
        manifests: Manifests,
        archive: Path,
        dns_seconds: float,
        session: aiohttp.ClientSession,
    ) -> None:
        """Everything is in the folder of the archive.

        `dns_seconds` is the age that the names' addresses may have. Raises SetupError.
        """
        self.manifests = manifests
        self.started: list[Pod] = []  # all that there have been
        self._archive, self._session = archive, session
        self._network = f"127.{1 + os.getpid() % 254}"  # probably no other rehearsal's
        self._dns_seconds, self._looked_up = dns_seconds, -math.inf
        self._numbers = itertools.count(1)
        self.replicas = Workload(manifests.replicas, self)
        self.gateways = Workload(manifests.gateways, self)
        self.autoscaler = Autoscaler(manifests.autoscaler) if manifests.autoscaler else None
        if self.autoscaler:
            self.replicas.desired = max(self.replicas.desired, self.autoscaler.minimum)
        self.sizes = [self.replicas.desired]  # after each scaling
        self._hosts = archive.parent / "hosts"
        self._look_up()
        take_over_hosts(self._hosts)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Everything as it should be, until the end, when everything is killed."""
        self._controllers = asyncio.create_task(self._control())
        try:
            await self.settle()
            yield
        finally:
            pods = [*self.gateways.pods, *self.replicas.pods]
            for pod in pods:
                pod.kill()
            tasks = [self._controllers, *(pod.life for pod in pods)]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for pod in pods:
                pod.unit.stop()

    async def _control(self) -> None:
        while True:
            for workload in (self.replicas, self.gateways):
                workload.reconcile()
            self._look_up()
            await asyncio.sleep(TICK_SECONDS)

    def _look_up(self) -> None:
        """Let the names stand for the replicas that are ready now, if their addresses are old."""
        if time.monotonic() - self._looked_up >= self._dns_seconds:
            self._looked_up = time.monotonic()
            names = " ".join(self.manifests.names)
            lines = [f"{pod.ip} {names}\n" for pod in self.replicas.ready()]
            self._hosts.write_text("".join(["127.0.0.1 localhost\n", *lines]))

    async def settle(self) -> None:
        """Wait until all pods are as they should be. Raises SetupError if they are not in time."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while not await self._is_settled():
            if self._controllers.done():
                self._controllers.result()
            if time.monotonic() > deadline:
                pods = [*self.replicas.pods, *self.gateways.pods]
                said = [pod.unit.server.last_lines() for pod in pods if pod.unit.server]
                raise SetupError(f"not as it should be in {SETTLE_SECONDS:g} s; they said {said}")
            await asyncio.sleep(TICK_SECONDS)

    async def _is_settled(self) -> bool:
        """Whether all pods are as they should be, and every gateway uses all replicas."""
        if not (self.replicas.is_settled() and self.gateways.is_settled()):
            return False
        count = self.replicas.desired
        try:
            for url in self.entrances("/health"):
                async with self._session.get(url) as answer:
                    if (await answer.json())["replicas"] != {"ready": count, "total": count}:
                        return False
        except aiohttp.ClientError:
            return False
        return True

    async def evict(self, pod: Pod) -> None:
        """As kubectl drain does: as soon as the budget allows it."""
        while len(self.replicas.ready()) <= self.manifests.least_ready(self.replicas.desired):
            await asyncio.sleep(EVICT_SECONDS)
        pod.deleted.set()
        await pod.life

    async def autoscale(self, autoscaler: Autoscaler, prometheus: Prometheus, folder: Path) -> None:
        """Follow the load, until it is cancelled; `folder` is Prometheus' own."""
        while True:
            living = [pod for pod in self.replicas.pods if not pod.deleted.is_set()]
            write_targets(folder, JOB, [pod.scraped for pod in living if pod.is_ready])
            values = await asyncio.to_thread(read_metric, prometheus, autoscaler.metric)
            metrics = [values.get(pod.scraped) for pod in living]
            wanted = autoscaler.decide(time.monotonic(), self.replicas.desired, metrics)
            if wanted != self.replicas.desired:
                self.replicas.desired = wanted
                self.sizes.append(wanted)
            await asyncio.sleep(SYNC_SECONDS)

    def start_pod(self, spec: Deployment, revision: int) -> Pod:
        number = next(self._numbers)
        ip = f"{self._network}.{number // 250}.{number % 250 + 1}"
        unit = unit_of(spec, number, ip, self._archive)
        pod = Pod(spec, revision, ip, unit, self._session)
        self.started.append(pod)
        return pod

    def entrances(self, path: str) -> list[str]:
        """Where a client's connection may go: the gateways that are ready, as URLs of a page."""
        port = self.manifests.gateways.environ.get("GATEWAY_PORT", "8000")
        return [f"http://{pod.ip}:{port}{path}" for pod in self.gateways.ready()]


def read_metric(prometheus: Prometheus, metric: str) -> dict[str, float]:
    """A metric's value by instance; none while Prometheus does not answer."""
    try:
        found = prometheus.query(metric)
    except requests.RequestException:
        return {}
    return {labels["instance"]: value for labels, value in found if not math.isnan(value)}


def take_over_hosts(file: Path) -> None:
    """Let this process, and those that it starts, read this file in place of /etc/hosts.

    Raises SetupError.
    """
    if os.geteuid() or not has_own_mounts() or not run_tool("mount", "--bind", file, "/etc/hosts"):
        raise SetupError(
            "a rehearsal gives its processes a hosts file of their own: it needs Linux, root and "
            "the right to mount"
        )
