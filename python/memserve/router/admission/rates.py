"""How much somebody may ask for: a share of the slots, requests and tokens per second. Knows no requests."""

from __future__ import annotations

import math
from dataclasses import dataclass

from memserve.core.errors import ConfigError

_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Rates:
    """What one tenant may have. The names are those of the API key file."""

    rps: float = math.inf
    """Requests per second; as many may come at once."""
    tps: float = math.inf
    """Tokens per second: those of prompts, and those that are asked for."""
    weight: float = 1.0
    """Its share of the slots, beside the weights of the others that want one."""

    def __post_init__(self) -> None:
        for name in ("rps", "tps", "weight"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} has to be more than 0")
        if math.isinf(self.weight):
            raise ConfigError("weight has to be finite")


class TokenBucket:
    """A token bucket that may go into debt: what has begun is charged when it is known.

    Source: the leaky bucket as a meter; ITU-T I.371. Times are the caller's, in seconds.
    """

    __slots__ = ("_burst", "_level", "_rate", "_seen_s")

    def __init__(self, rate: float, burst: float, now_s: float) -> None:
        """Full at first: `burst` may be taken at once, and `rate` comes back every second."""
        self._rate, self._burst = rate, burst
        self._level, self._seen_s = burst, now_s

    def wait_s(self, now_s: float, needed: float) -> float:
        """How long until `needed` is there; 0.0 if it is now. `needed` is at most the burst."""
        level = min(self._burst, self._level + (now_s - self._seen_s) * self._rate)
        self._level, self._seen_s = level, now_s
        return 0.0 if level >= needed - _ROUNDING else (needed - level) / self._rate

    def take(self, amount: float) -> None:
        """Take `amount`, there or not."""
        self._level -= amount
