"""`longest_prefix`: the most cached blocks of the prompt, whatever the load."""

from __future__ import annotations

from collections.abc import Sequence

from memserve.scheduling.context import Candidate, RoutingContext
from memserve.scheduling.cost_model.model import CostModel
from memserve.scheduling.policy import Policy, Rank


def rank(_context: RoutingContext, candidates: Sequence[Candidate], _costs: CostModel) -> list[Rank]:
    """Minus the number of cached blocks."""
    return [-it.depths[-1] for it in candidates]


POLICY = Policy("longest_prefix", "by the number of cached blocks alone", rank, needs=frozenset({"tokens"}))
