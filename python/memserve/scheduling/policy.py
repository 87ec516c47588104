"""The interface of a routing policy: it ranks the candidates of one role, and the lowest rank is chosen.

A policy is a pure function of its arguments: no clock, no random source (it draws with `mix_bits` from
the request's number), no effect.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from memserve.scheduling.context import Candidate, RoutingContext
from memserve.scheduling.cost_model.model import CostModel

Rank = float | tuple[float, ...]
RankFunction = Callable[[RoutingContext, Sequence[Candidate], CostModel], Sequence[Rank]]
"""One rank for each candidate, in order; there is at least one candidate. `decide` breaks ties."""

Need = Literal["tokens", "load", "session"]
"""What a policy reads: cached blocks (known only if the prompt's keys are), load, the session's hash."""

_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Policy:
    """One routing policy."""

    name: str
    """The value of `--policy`."""
    help: str
    """One line for `--help` and the reference."""
    rank: RankFunction
    needs: frozenset[Need] = frozenset()
    """Without "tokens" it also places prompts whose tokens are unknown; with it, the session does."""
    rank_decodes: RankFunction | None = None
    """Ranks decode instances, where that differs from `rank`."""


def mix_bits(*numbers: int) -> int:
    """64 well mixed bits of some numbers. Source: splitmix64."""
    state = 0
    for number in numbers:
        state = (state ^ number) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state
