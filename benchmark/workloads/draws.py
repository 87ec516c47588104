"""Random sizes and tokens, the same on every machine."""

from __future__ import annotations

from math import log
from random import Random


class Draws:
    """One stream of random numbers. Its name says for what: other streams never move it."""

    def __init__(self, *name: object) -> None:
        self.random = Random("/".join(map(str, name)))

    def lognormal(self, mean: float, sigma: float) -> float:
        """A heavy-tailed size. `sigma` is the standard deviation of its logarithm."""
        return self.random.lognormvariate(log(mean) - sigma * sigma / 2, sigma)

    def tokens(self, count: int, vocabulary: tuple[int, int]) -> tuple[int, ...]:
        return tuple(self.random.choices(range(*vocabulary), k=count))
