"""`prompt_tree`: the least predicted cost, from cached blocks by tier, queue and load (Eq. 1)."""

from __future__ import annotations

from collections.abc import Sequence

from memserve.scheduling.context import Candidate, RoutingContext
from memserve.scheduling.cost_model.model import CostModel
from memserve.scheduling.policy import Policy, Rank
from memserve.scheduling.request_cost import decode_parts, prefill_parts


def rank(context: RoutingContext, candidates: Sequence[Candidate], costs: CostModel) -> list[Rank]:
    """The predicted cost of the request at each prefill."""
    return [
        queue_s + load_s + exec_s + others_s + recent_s
        for queue_s, load_s, exec_s, others_s, recent_s in prefill_parts(context, candidates, costs)
    ]


def rank_decodes(context: RoutingContext, candidates: Sequence[Candidate], costs: CostModel) -> list[Rank]:
    """The predicted cost of the request at each decode."""
    return list(map(sum, decode_parts(context, candidates, costs)))


POLICY = Policy(
    "prompt_tree",
    "by the blocks of the prompt that each instance holds, its queue, and the cost of moving or computing "
    "the rest",
    rank,
    needs=frozenset({"tokens", "load"}),
    rank_decodes=rank_decodes,
)
