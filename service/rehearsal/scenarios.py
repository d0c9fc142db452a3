"""What is rehearsed: rollouts, drains, deaths and a day, each under load."""

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import aiohttp

from handler.errors import SetupError
from service.chaos.archive import copy_with, make_archive
from service.chaos.prometheus import running_prometheus
from service.rehearsal.autoscaler import Autoscaler
from service.rehearsal.cluster import JOB, Cluster
from service.rehearsal.load import OBJECTIVE_SECONDS, Account, Traffic
from service.rehearsal.manifests import read_manifests
from service.tables import text_line
from service.temporary import TemporaryFolder

CALM_SECONDS = 2.0  # before and after what happens
# A forward pass sleeps so long for each image: two cores carry the peak of several replicas, and
# whatever happens finds requests in hand.
PASS_SECONDS = 0.1
# Of the time of a replica's workers, which one that is alone carries well. By
# classifier_capacity_ratio it is the autoscaler's target of 0.7 for two workers.
BUSY_SHARE = 0.3
PEAK_REPLICAS = 6  # that the noon of a day needs, if the autoscaler may have so many
SCRAPE_SECONDS = 10  # as in deploy/monitoring/prometheus.yml
HELD = f"p99 <= {OBJECTIVE_SECONDS:g} s, % of time"
HEADINGS = ("scenario", "seconds", "sent", "right", "refused", "failed", "p50 ms", "p99 ms", HELD)
WIDTHS = (10, 7, 6, 6, 7, 6, 7, 7, len(HELD))
SLEEP = f"""

import time

_load_engine = load_engine


def load_engine(*args, **kwargs):
    engine = _load_engine(*args, **kwargs)
    launch = engine.launch

    def sleep(images):
        time.sleep({PASS_SECONDS} * len(images))
        return launch(images)

    engine.launch = sleep
    return engine
"""


async def roll_out(cluster: Cluster) -> None:
    """A new version of the replicas' template."""
    cluster.replicas.revision += 1
    await cluster.settle()


async def drain(cluster: Cluster) -> None:
    """The node of the replica that has been there longest."""
    await cluster.evict(min(cluster.replicas.ready(), key=lambda pod: pod.ready_since or 0))
    await cluster.settle()


async def kill(cluster: Cluster) -> None:
    """All processes of the replica that has started again least often."""
    pod = min(cluster.replicas.ready(), key=lambda pod: pod.restarts)
    restarts = pod.restarts
    pod.kill()
    while pod.restarts == restarts:
        await asyncio.sleep(0.1)
    await cluster.settle()


REPEATED: dict[str, Callable[[Cluster], Awaitable[None]]] = {
    "rollout": roll_out,
    "drain": drain,
    "kill": kill,
}
SCENARIOS = (*REPEATED, "day")


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What is to be rehearsed, and with what."""

    scenarios: Sequence[str]
    times: int  # of each, but of the day
    minutes: float  # of the day
    manifests: Sequence[Path]
    archive: Path | None  # None: one of three colours is made
    dns_seconds: float

    async def run(self) -> bool:
        """Print what came of it; whether no request failed. Raises SetupError."""
        manifests = read_manifests(self.manifests)
        kubelet = aiohttp.TCPConnector(force_close=True)  # a connection for each probe
        with TemporaryFolder("rehearse-") as folder:
            async with aiohttp.ClientSession(connector=kubelet) as session:
                archive = folder / (self.archive.name if self.archive else "mobilenet_v2.mar")
                cluster = Cluster(manifests, archive, self.dns_seconds, session)
                if self.archive:
                    copy_with(self.archive, archive, SLEEP)
                else:
                    make_archive(folder, SLEEP)
                async with cluster.running():
                    return report(cluster, await self._play(cluster, folder))

    async def _play(self, cluster: Cluster, folder: Path) -> dict[str, Account]:
        print(text_line(HEADINGS, WIDTHS), flush=True)
        accounts = {}
        for scenario in self.scenarios:
            for number in range(1, 1 + (1 if scenario == "day" else self.times)):
                if scenario == "day":
                    one = await self._play_day(cluster, folder)
                else:
                    one = await play(cluster, REPEATED[scenario])
                accounts[f"{scenario} {number}"] = one
                print(line_of(f"{scenario} {number}", one), flush=True)
        return accounts

    async def _play_day(self, cluster: Cluster, folder: Path) -> Account:
        if (autoscaler := cluster.autoscaler) is None:
            raise SetupError("the manifests have no autoscaler of the replicas")
        targets = {JOB: [pod.scraped for pod in cluster.replicas.ready()]}
        curve = day_curve(carried(cluster), autoscaler, 60 * self.minutes)
        with ExitStack() as stack:
            prometheus = await asyncio.to_thread(
                stack.enter_context, running_prometheus(folder, targets, SCRAPE_SECONDS)
            )
            with Traffic(cluster.entrances, curve) as traffic:
                autoscaling = cluster.autoscale(autoscaler, prometheus, folder)
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(autoscaling, 60 * self.minutes)
        return traffic.account()


async def play(cluster: Cluster, scenario: Callable[[Cluster], Awaitable[None]]) -> Account:
    """Once, under the load that one replica carries while others start beside it."""
    with Traffic(cluster.entrances, lambda _: carried(cluster)) as traffic:
        await asyncio.sleep(CALM_SECONDS)
        await scenario(cluster)
        await asyncio.sleep(CALM_SECONDS)
    return traffic.account()


def carried(cluster: Cluster) -> float:
    """Requests a second of one replica."""
    return BUSY_SHARE * cluster.manifests.replicas.cpus / PASS_SECONDS


def day_curve(one: float, autoscaler: Autoscaler, seconds: float) -> Callable[[float], float]:
    """Requests a second, from the night over noon to the night; `one` replica carries so many.

    At night half of what the fewest replicas carry.
    """
    night, noon = one * autoscaler.minimum / 2, one * min(PEAK_REPLICAS, autoscaler.maximum)
    return lambda now: night + (noon - night) * (1 - math.cos(2 * math.pi * now / seconds)) / 2


def line_of(name: str, one: Account) -> str:
    """A line of the table."""
    sums = (sum(one.refused.values()), sum(one.failed.values()))
    row = (name, one.seconds, one.sent, one.right, *sums, one.p50_ms, one.p99_ms, 100 * one.held)
    return text_line(row, WIDTHS)


def report(cluster: Cluster, accounts: Mapping[str, Account]) -> bool:
    """Print one JSON line; whether no request failed."""
    line = {
        "sent": sum(one.sent for one in accounts.values()),
        "right": sum(one.right for one in accounts.values()),
        "runs": {name: asdict(one) for name, one in accounts.items()},
        "replicas": cluster.sizes,
        "turns": turns_of(cluster.sizes),
        "restarts": sum(pod.restarts for pod in cluster.started),
        "killed_by_grace": sum(pod.killed for pod in cluster.started),
    }
    print(f"\n{json.dumps(line)}", flush=True)
    return not any(has_failed(name, one) for name, one in accounts.items())


def has_failed(name: str, one: Account) -> bool:
    """More load than there are replicas yet is refused in a day, and never in another scenario."""
    return bool(one.failed if name.startswith("day") else one.unexplained())


def turns_of(sizes: Iterable[int]) -> int:
    """How often a number that grew shrinks next, or the other way round: a day has one."""
    grew = [after > before for before, after in pairwise(sizes)]
    return sum(before != after for before, after in pairwise(grew))
