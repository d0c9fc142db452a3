"""How many requests may be under way: as many as the server takes without refusing any.

The rule is TCP's (additive increase, multiplicative decrease): one more after each round of
answers, half as many after a refusal. Times are seconds of one clock, which the caller reads.
"""

import random

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0  # seconds after a refusal that does not say how long


class Pace:
    """`most` requests at once; `patience` seconds of refusals alone until the server is lost."""

    def __init__(self, most: int, patience: float) -> None:
        self.most = most
        self.patience = patience
        self._limit = 1.0
        self._resume = 0.0  # nothing is sent before this time
        self._halved = float("-inf")
        self._refusals = 0  # since the last answer, those of one round counted once
        self._refused_since: float | None = None

    @property
    def allowed(self) -> int:
        return int(self._limit)

    def pause(self, now: float) -> float:
        """Seconds until a request may be sent."""
        return max(0.0, self._resume - now)

    def answered(self) -> None:
        self._limit = min(self.most, self._limit + 1 / self._limit)
        self._refusals = 0
        self._refused_since = None

    def refused(self, sent: float, now: float, retry_after: float | None) -> bool:
        """A request that was sent then is refused now, or has got no answer.

        The refusals of one round, which were all sent at the old limit, halve it once. Returns
        whether it is the first since an answer.
        """
        if is_first := self._refused_since is None:
            self._refused_since = now
        wait = retry_after
        if sent > self._halved:
            self._halved = now
            self._limit = max(1.0, self._limit / 2)
            backoff = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(self._refusals, 10))
            self._refusals += 1
            if wait is None:
                wait = backoff * random.uniform(0.5, 1)  # noqa: S311 - clients part, no secret
        self._resume = max(self._resume, now + (wait or 0.0))
        return is_first

    def is_lost(self, now: float) -> bool:
        """Whether nothing but refusals came for too long, or the server asks to wait longer."""
        since = self._refused_since
        return since is not None and max(now, self._resume) - since > self.patience
