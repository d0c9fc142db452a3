"""Which faults there are, and in which order a seed injects them: plain data, to be replayed."""

import json
import random
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from handler.errors import SetupError

CALM_SECONDS = (1.0, 3.0)  # between a recovery and the next fault
PAUSE_SECONDS = 10  # of a worker, after which it is not continued
DOWN_SECONDS = 6  # until a recovery, of which nothing answers for long enough to be seen


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a fault is allowed to do, so that the checker knows what is not."""

    seconds: tuple[float, float]  # the shortest and the longest that it lasts
    recovery: float  # seconds until everything must be as before
    noticed: float = 8.0  # seconds after which it holds no client up any more
    target: str = "replica"  # "gateway": the only one, whose clients notice
    ends: bool = False  # its launcher, which is then started again
    cuts: bool = False  # clients' connections may break; their second attempt must be answered
    stalls: bool = False  # clients may wait so much longer as it lasts
    sheds: bool = False  # more than fits: 429 and 503 with a reason are right answers
    # Alerts that it must raise, and how many seconds it must last for that: until the recovery, if
    # it is momentary. Pending is enough, as a fault is shorter than the minutes that some wait.
    alerts: Mapping[str, float] = field(default_factory=dict)
    may_raise: tuple[str, ...] = ()  # besides COMMON
    unraised: str = ""  # why it must raise no alert

    @property
    def is_momentary(self) -> bool:
        return self.seconds[1] <= 1


DOWN, NO_WORKER, HUNG = "ClassifierDown", "ClassifierNoWorker", "ClassifierWorkerHung"
GATEWAY_DOWN, LEFT_OUT = "GatewayDown", "GatewayReplicaLeftOut"
RESTARTING, REFUSED = "ClassifierWorkerRestarting", "ClassifierImagesRefused"
# Any fault may raise these. Most are about shares of requests and means of a minute, which few
# requests change in a campaign that is short and has some 13 requests a second.
COMMON = {
    LEFT_OUT,
    "ClassifierErrors",
    "ClassifierErrorsLasting",
    "ClassifierSlow",
    "ClassifierSlowLasting",
    "ClassifierQueueGrowing",
}
# These wait a quarter of an hour or longer: they are pending whenever there are few requests or a
# process has just started, and only what fires is an alarm.
PATIENT = {
    "ClassifierConfidenceFell",
    "ClassifierWorkerLost",
    "ClassifierWorkerMemoryGrowing",
    REFUSED,
}
FEW = f"a worker is back within seconds; `{RESTARTING}` after more than 3 in an hour"
SPARED = "the replicas serve on"
REPLACED = "nginx starts another one at once"
REFUSING = "what was asked for is refused, and nothing else"

# The limits of recovery are those of two slow, shared cores: a start takes some 20 s there, and
# a hung worker is noticed after 10 to 15 s.
KINDS = {
    "kill_worker": Kind(seconds=(0, 1), recovery=60, may_raise=(RESTARTING,), unraised=FEW),
    "stop_worker": Kind(
        seconds=(2, 20), recovery=90, alerts={HUNG: PAUSE_SECONDS}, may_raise=(RESTARTING,)
    ),
    "kill_java": Kind(
        seconds=(0, 1), recovery=120, ends=True, alerts={DOWN: DOWN_SECONDS}, may_raise=(NO_WORKER,)
    ),
    "stop_java": Kind(
        seconds=(2, 15), recovery=90, alerts={DOWN: 5, LEFT_OUT: 12}, may_raise=(NO_WORKER,)
    ),
    "kill_launcher": Kind(
        seconds=(0, 1), recovery=120, ends=True, alerts={DOWN: DOWN_SECONDS}, may_raise=(NO_WORKER,)
    ),
    "stop_launcher": Kind(seconds=(2, 15), recovery=60, unraised=SPARED),
    # The gateway asks for a prediction every 10 s, waits 10 s, and does so twice.
    "hung_model": Kind(
        seconds=(2, 40), recovery=90, noticed=35, alerts={HUNG: 25}, may_raise=(RESTARTING,)
    ),
    "full_disk": Kind(seconds=(5, 15), recovery=60, unraised=SPARED),
    "memory_pressure": Kind(
        seconds=(5, 15), recovery=90, may_raise=(RESTARTING, HUNG), unraised=FEW
    ),
    "scale": Kind(seconds=(1, 5), recovery=90, may_raise=(RESTARTING,), unraised="as was asked"),
    "rolling_restart": Kind(
        seconds=(0, 1), recovery=180, alerts={DOWN: 2 * DOWN_SECONDS}, may_raise=(NO_WORKER,)
    ),
    "kill_nginx_worker": Kind(
        seconds=(0, 1),
        recovery=30,
        target="gateway",
        cuts=True,
        may_raise=(GATEWAY_DOWN,),
        unraised=REPLACED,
    ),
    "stop_nginx_worker": Kind(
        seconds=(1, 5), recovery=30, target="gateway", stalls=True, alerts={GATEWAY_DOWN: 4.5}
    ),
    "kill_gateway": Kind(
        seconds=(0, 1),
        recovery=60,
        target="gateway",
        ends=True,
        cuts=True,
        alerts={GATEWAY_DOWN: DOWN_SECONDS},
    ),
    "new_keys": Kind(seconds=(0, 1), recovery=30, target="gateway", unraised="as was asked"),
    "bad_multipart": Kind(
        seconds=(0, 1), recovery=30, target="gateway", may_raise=(REFUSED,), unraised=REFUSING
    ),
    "slow_bodies": Kind(seconds=(0, 1), recovery=30, target="gateway", unraised=REFUSING),
    "crowd": Kind(seconds=(0, 1), recovery=60, target="gateway", sheds=True, unraised=REFUSING),
}


@dataclass(frozen=True)
class Step:
    """One fault of a schedule."""

    fault: str  # a name of KINDS
    replica: int  # the one that it hits; -1: the gateway
    seconds: float  # it lasts
    calm: float  # seconds before it

    def __post_init__(self) -> None:
        if self.fault not in KINDS:
            raise SetupError(f"a fault must be one of {', '.join(KINDS)}, got {self.fault!r}")

    @property
    def kind(self) -> Kind:
        return KINDS[self.fault]


def make_schedule(
    seed: int, replicas: int, faults: Collection[str] | None = None
) -> Iterator[Step]:
    """Endless rounds of these faults, or all, one after the other, each round in another order."""
    rng = random.Random(seed)  # noqa: S311 no secret
    names = sorted(set(faults or KINDS))
    while True:
        for fault in rng.sample(names, len(names)):
            kind = KINDS[fault]
            replica = rng.randrange(replicas)
            seconds, calm = rng.uniform(*kind.seconds), rng.uniform(*CALM_SECONDS)
            hit = replica if kind.target == "replica" else -1
            yield Step(fault, hit, round(seconds, 1), round(calm, 1))


def read_schedule(path: Path) -> list[Step]:
    """The steps in a history, or in a file of lines like its faults. Raises SetupError."""
    try:
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
        names = ("fault", "replica", "seconds", "calm")
        return [
            Step(*(line[name] for name in names))
            for line in lines
            if line.get("record", "fault") == "fault"
        ]
    except (OSError, ValueError, KeyError, AttributeError) as exc:
        raise SetupError(f"{path} is no schedule: {exc!r}") from exc
