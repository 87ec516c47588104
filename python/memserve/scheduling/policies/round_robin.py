"""`round_robin`: the candidates in turn."""

from __future__ import annotations

from collections.abc import Sequence

from memserve.scheduling.context import Candidate, RoutingContext
from memserve.scheduling.cost_model.model import CostModel
from memserve.scheduling.policy import Policy, Rank


def rank(context: RoutingContext, candidates: Sequence[Candidate], _costs: CostModel) -> list[Rank]:
    """How many turns away each candidate is."""
    count = len(candidates)
    return [(i - context.turn) % count for i in range(count)]


def rank_decodes(context: RoutingContext, candidates: Sequence[Candidate], _costs: CostModel) -> list[Rank]:
    """Shifted by one in each round: otherwise each of n prefills always meets the same of n decodes."""
    count = len(candidates)
    return [(i - context.turn - context.turn // count) % count for i in range(count)]


POLICY = Policy("round_robin", "the instances in turn", rank, rank_decodes=rank_decodes)
