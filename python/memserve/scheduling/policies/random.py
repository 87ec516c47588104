"""`random`: a uniformly drawn candidate."""

from __future__ import annotations

from collections.abc import Sequence

from memserve.scheduling.context import Candidate, RoutingContext
from memserve.scheduling.cost_model.model import CostModel
from memserve.scheduling.policy import Policy, Rank, mix_bits


def rank(context: RoutingContext, candidates: Sequence[Candidate], _costs: CostModel) -> list[Rank]:
    """0 for the drawn candidate, 1 for all others."""
    drawn = mix_bits(context.seed, context.turn) % len(candidates)
    return [float(i != drawn) for i in range(len(candidates))]


POLICY = Policy("random", "a drawn instance", rank)
