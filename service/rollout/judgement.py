"""Whether a new version is worse than the old one: tests that may be looked at at every moment.

Each figure is a share: of requests that fail, that are slow, or whose best class is another. An
interval for such a share holds at all times at once with a given probability, so that stopping at
any look keeps the rate of false alarms.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

FALSE_ALARMS = 0.01  # the probability that a version as good as the old one is ever taken back
QUANTILES = (0.5, 0.95)  # of the old version's latency, at which the two are compared
SLOWER = 0.1  # of the requests may be slower, beyond max_slowdown, than of the old version's
PRIOR = 0.5  # both parameters of the beta distribution over which the likelihoods are mixed
PRECISION = 2.0**-20  # of a limit
TRUNCATED = 0.9  # of a claim that is shown


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """How much worse a new version may be."""

    max_errors: float  # more of the requests that fail, as a share
    max_slowdown: float  # times as long
    max_disagreement: float  # of the answers with another best class than the old version's


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What one version did in one step."""

    requests: int = 0  # of clients, and shadows
    live: int = 0  # of clients
    errors: int = 0
    rescued: int = 0  # of clients, which the old version has answered after an error
    compared: int = 0
    disagreements: int = 0
    seconds: dict[float, int] = field(default_factory=dict)  # upper edge -> answers up to it

    @property
    def answers(self) -> int:
        return max(self.seconds.values(), default=0)

    def slower_than(self, seconds: float) -> int:
        """How many answers took longer, beyond doubt: the edge above counts."""
        edge = edge_of(seconds)
        return self.answers - max((n for at, n in self.seconds.items() if at <= edge), default=0)

    def quantile(self, share: float) -> float:
        """The least edge within which this share of the answers were given, in seconds."""
        needed = share * self.answers
        return min((edge for edge, n in self.seconds.items() if n >= needed), default=math.inf)


def edge_of(seconds: float) -> float:
    """The upper edge of the bucket of a latency, as deploy/gateway/rollout.lua has them."""
    bucket = math.ceil(4 * math.log2(max(seconds, 0.001) / 0.001) - 1e-3)
    return round(0.001 * 2 ** (min(bucket, 64) / 4), 6)


def count_seconds(latencies: Sequence[float]) -> dict[float, int]:
    """Latencies as the field `seconds` of Counts."""
    edges = sorted(map(edge_of, latencies))
    return {edge: number for number, edge in enumerate(edges, start=1)}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One comparison: what was seen, and whether the new version is worse beyond a bound."""

    what: str
    new: tuple[int, int]  # hits, of how many
    old: tuple[int, int]
    at_least: float  # the new version's share, for certain
    at_most: float  # the old one's
    tolerated: float  # difference

    @property
    def is_broken(self) -> bool:
        return self.at_least > self.at_most + self.tolerated

    def __str__(self) -> str:
        (hits, of), (old_hits, old_of) = self.new, self.old
        text = f"{self.what}: {hits} of {of}"
        if old_of:
            text += f", of the old version's {old_hits} of {old_of}"
        if self.is_broken:
            limit = self.at_most + self.tolerated
            text += f"; the share is above {self.at_least:.1%}, and the bound is {limit:.1%}"
        return text


def interval(hits: int, trials: int, alpha: float) -> tuple[float, float]:
    """Limits of a share that hold at all numbers of trials at once, each with 1 - alpha.

    The likelihood ratio of a mixture of all shares to the true one is a martingale that starts at
    1, and exceeds 1 / alpha ever with at most the probability alpha (Ville). The limits are the
    shares at which it does. H. Robbins, "Statistical methods related to the law of the iterated
    logarithm", Annals of Mathematical Statistics 41 (1970); S. Howard et al., "Time-uniform,
    nonparametric, nonasymptotic confidence sequences", Annals of Statistics 49 (2021).
    """
    if not trials:
        return 0.0, 1.0
    misses = trials - hits
    mixture = _log_beta(hits + PRIOR, misses + PRIOR) - _log_beta(PRIOR, PRIOR) + math.log(alpha)

    def is_out(share: float) -> bool:
        likelihood = hits * math.log(share) if hits else 0.0
        likelihood += misses * math.log1p(-share) if misses else 0.0
        return mixture > likelihood

    def limit(outside: float, inside: float) -> float:
        while abs(outside - inside) > PRECISION:
            middle = (outside + inside) / 2
            outside, inside = (middle, inside) if is_out(middle) else (outside, middle)
        return outside

    seen = hits / trials
    return limit(0.0, seen) if hits else 0.0, limit(1.0, seen) if misses else 1.0


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def judge(
    new: Counts,
    old: Counts,
    slow: Sequence[float],
    bounds: Bounds,
    alpha: float,
) -> list[Finding]:
    """Compare what two versions did; together, false alarms stay below alpha.

    At the last step, at which the old version gets nothing, `old` is what it did when it had all
    requests.

    `slow` are the old version's latencies in seconds at the QUANTILES, measured before. If a new
    version takes at most `max_slowdown` times as long, no more of its answers take longer than
    `max_slowdown` times such a latency than the old one's take longer than it.
    """
    each = alpha / (2 * (2 + len(slow)))  # two limits a comparison

    def compare(
        what: str, hits: tuple[int, int], others: tuple[int, int], tolerated: float
    ) -> Finding:
        return Finding(
            what=what,
            new=hits,
            old=others,
            at_least=interval(*hits, each)[0],
            at_most=interval(*others, each)[1] if others[1] else 0.0,
            tolerated=tolerated,
        )

    findings = [
        compare(
            "failed", (new.errors, new.requests), (old.errors, old.requests), bounds.max_errors
        ),
        compare(
            "another best class", (new.disagreements, new.compared), (0, 0), bounds.max_disagreement
        ),
    ]
    for latency in slow if old.answers else ():
        limit = latency * bounds.max_slowdown
        findings.append(
            compare(
                f"slower than {limit * 1000:.0f} ms",
                (new.slower_than(limit), new.answers),
                (old.slower_than(latency), old.answers),
                SLOWER,
            )
        )
    return findings
