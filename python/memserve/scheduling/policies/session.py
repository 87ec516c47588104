"""`session`: rendezvous hashing, so that a session stays at its instance as long as that instance is there.

A request without a session goes by least load.
"""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

from memserve.scheduling.context import Candidate, RoutingContext
from memserve.scheduling.cost_model.model import CostModel
from memserve.scheduling.policies import least_load
from memserve.scheduling.policy import Policy, Rank, mix_bits


def rank(context: RoutingContext, candidates: Sequence[Candidate], costs: CostModel) -> list[Rank]:
    """The hash of the session with each candidate's name."""
    if context.session is None:
        return least_load.rank(context, candidates, costs)
    return [mix_bits(context.session, crc32(it.instance_id.encode())) for it in candidates]


POLICY = Policy(
    "session",
    "each session to one instance, by x-session-id, x-user-id or `user`; others by least load",
    rank,
    needs=frozenset({"load", "session"}),
)
