"""`power_of_two`: the less loaded of two candidates that are drawn at random."""

from __future__ import annotations

from collections.abc import Sequence

from memserve.scheduling.context import Candidate, RoutingContext
from memserve.scheduling.cost_model.model import CostModel
from memserve.scheduling.policies.least_load import load
from memserve.scheduling.policy import Policy, Rank, mix_bits


def rank(context: RoutingContext, candidates: Sequence[Candidate], _costs: CostModel) -> list[Rank]:
    """The two drawn candidates first, each by its load."""
    count = len(candidates)
    one = mix_bits(context.seed, context.turn) % count
    other = (one + 1 + mix_bits(context.seed, context.turn, 1) % max(count - 1, 1)) % count
    return [(float(i not in (one, other)), *load(it)) for i, it in enumerate(candidates)]


POLICY = Policy("power_of_two", "the less loaded of two drawn instances", rank, needs=frozenset({"load"}))
