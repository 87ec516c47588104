"""`least_load`: the least work dispatched and not done."""

from __future__ import annotations

from collections.abc import Sequence

from memserve.scheduling.context import Candidate, RoutingContext
from memserve.scheduling.cost_model.model import CostModel
from memserve.scheduling.policy import Policy, Rank


def load(candidate: Candidate) -> tuple[float, ...]:
    """The candidate's load: queued prefill seconds, then the decode batch, then all running requests."""
    return candidate.queued_s, candidate.decode_batch, candidate.running


def rank(_context: RoutingContext, candidates: Sequence[Candidate], _costs: CostModel) -> list[Rank]:
    """The load of each candidate."""
    return [load(it) for it in candidates]


POLICY = Policy("least_load", "by the least queued and running work", rank, needs=frozenset({"load"}))
