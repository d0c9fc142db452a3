"""Which faults there are, and in which order a seed injects them: plain data, to be replayed."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from handler.errors import SetupError

CALM_SECONDS = (1.0, 3.0)  # between a recovery and the next fault


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


# The limits of recovery are those of two slow, shared cores: a start takes some 20 s there, and
# a hung worker is noticed after 10 to 30 s.
KINDS = {
    "kill_worker": Kind(seconds=(0, 1), recovery=60),
    "stop_worker": Kind(seconds=(2, 20), recovery=90),
    "kill_java": Kind(seconds=(0, 1), recovery=120, ends=True),
    "stop_java": Kind(seconds=(2, 15), recovery=90),
    "kill_launcher": Kind(seconds=(0, 1), recovery=120, ends=True),
    "stop_launcher": Kind(seconds=(2, 15), recovery=60),
    # The gateway asks for a prediction every 10 s, waits 10 s, and does so twice.
    "hung_model": Kind(seconds=(2, 40), recovery=90, noticed=35),
    "full_disk": Kind(seconds=(5, 15), recovery=60),
    "memory_pressure": Kind(seconds=(5, 15), recovery=90),
    "scale": Kind(seconds=(1, 5), recovery=90),
    "rolling_restart": Kind(seconds=(0, 1), recovery=180),
    "kill_nginx_worker": Kind(seconds=(0, 1), recovery=30, target="gateway", cuts=True),
    "stop_nginx_worker": Kind(seconds=(1, 5), recovery=30, target="gateway", stalls=True),
    "kill_gateway": Kind(seconds=(0, 1), recovery=60, target="gateway", ends=True, cuts=True),
    "new_keys": Kind(seconds=(0, 1), recovery=30, target="gateway"),
    "bad_multipart": Kind(seconds=(0, 1), recovery=30, target="gateway"),
    "crowd": Kind(seconds=(0, 1), recovery=60, target="gateway", sheds=True),
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


def make_schedule(seed: int, replicas: int) -> Iterator[Step]:
    """Endless rounds of all faults, one after the other, each round in another order."""
    rng = random.Random(seed)  # noqa: S311 no secret
    while True:
        for fault in rng.sample(sorted(KINDS), len(KINDS)):
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
