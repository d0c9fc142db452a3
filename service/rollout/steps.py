"""The steps of a rollout, and when one is over: pure, without any effect."""

from collections.abc import Sequence
from dataclasses import dataclass

from service.rollout.judgement import Counts


@dataclass(frozen=True, kw_only=True)
class Step:
    """One setting of the gateway."""

    number: int  # from 1
    percent: float  # of the requests go to the new version
    shadow: float  # percent of the others are asked of it, too

    @property
    def is_baseline(self) -> bool:
        """Whether the old version alone is looked at."""
        return self.percent == self.shadow == 0

    @property
    def is_last(self) -> bool:
        return self.percent == 100

    def __str__(self) -> str:
        if self.is_baseline:
            return "old version alone"
        return f"{self.percent:g} % of the requests" if self.percent else "shadow"


@dataclass(frozen=True, kw_only=True)
class Pace:
    """What must have been seen before the next step."""

    seconds: float  # that a step takes at least
    requests: int  # that it needs at least
    timeout: float  # seconds within which it must have seen them

    def is_over(self, step: Step, new: Counts, old: Counts, seconds: float) -> bool:
        judged = old if step.is_baseline else new
        return seconds >= self.seconds and judged.requests >= self.requests

    def is_late(self, seconds: float) -> bool:
        return seconds >= max(self.timeout, self.seconds)


def make_steps(percents: Sequence[float], shadow: float) -> list[Step]:
    """The old version alone, the shadow if there is to be one, and the shares that clients get."""
    shares = [(0.0, 0.0), *([(0.0, shadow)] if shadow else []), *((p, shadow) for p in percents)]
    return [
        Step(number=number, percent=percent, shadow=0.0 if percent == 100 else share)
        for number, (percent, share) in enumerate(shares, start=1)
    ]
