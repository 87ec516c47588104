"""Evaluates a finished prefill: refines the costs, and measures the prediction and the choice.

Knows no instances and no queue: the assignment holds both as they were when the request was placed.
"""

from __future__ import annotations

from typing import NamedTuple

from memserve.core.block_addr import LOCAL_TIERS, Tier
from memserve.scheduling.assignment import Assignment
from memserve.scheduling.cost_model.model import Observation, Work
from memserve.scheduling.request_cost import prefill_parts

MAX_CANDIDATES = 64
"""Regret is not computed above this many candidates."""
ERROR_WEIGHT = 0.02
"""Weight of the newest prediction error in the mean."""


class PrefillReport(NamedTuple):
    """A finished prefill, compared with its prediction."""

    seconds: float
    """From its dispatch to its first token."""
    error: float | None = None
    """Moving mean of |predicted - observed| / observed over all prefills; None if `seconds` is 0."""
    regret_s: float | None = None
    """How much longer it took than the best other choice would have, as known then; None if not computed."""


def work_of(assignment: Assignment, cached_tokens: int | None) -> Work | None:
    """The work of its prefill; None if that does not report how many prompt tokens were cached."""
    prompt = assignment.prompt
    if prompt.unknown is not None or len(prompt.chains) != 1 or cached_tokens is None:
        return None
    if not 0 <= cached_tokens < prompt.num_tokens:
        return None
    return Work.of(prompt.num_tokens, cached_tokens)


def update_costs(assignment: Assignment, seconds: float, cached_tokens: int | None) -> None:
    """Learn from a prefill that had its instance to itself, if it reports its cached tokens."""
    if cached_tokens is None or work_of(assignment, cached_tokens) is None or seconds <= 0:
        return
    context, chosen, costs = assignment.decision.context, assignment.decision.chosen, assignment.costs
    num_tokens = assignment.prompt.num_tokens
    num_loaded = cached_tokens - context.cached_tokens(chosen.hbm_blocks)
    if num_loaded < context.page_tokens:
        costs.prefilled(Observation(num_tokens, cached_tokens, seconds))
        return
    tiers = [tier for tier in LOCAL_TIERS[1:] if chosen.depths[tier] > chosen.depths[tier - 1]]
    if len(tiers) > 1:
        return  # the share of each tier is not known
    load_s = seconds - costs.model.exec_s(num_tokens, cached_tokens)
    costs.loaded(num_loaded, load_s, total_s=seconds, tier=tiers[0] if tiers else Tier.DRAM)


class PredictionError:
    """The mean error of all predictions so far. One thread only."""

    def __init__(self) -> None:
        self._error = 0.0
        self._num_recorded = 0

    def record(self, assignment: Assignment, seconds: float) -> PrefillReport:
        """Compare a prefill that took so long with its prediction, and with the other candidates.

        The others' times are predicted with today's costs and the queues of then.
        """
        if seconds <= 0:
            return PrefillReport(seconds)
        decision = assignment.decision
        self._num_recorded += 1
        error = abs(decision.chosen.queued_s + assignment.work_s - seconds) / seconds
        self._error += max(ERROR_WEIGHT, 1 / self._num_recorded) * (error - self._error)
        context = decision.context
        if len(context.prefills) > MAX_CANDIDATES:
            return PrefillReport(seconds, self._error)
        others = [it for it in context.prefills if it.instance_id != decision.prefill]
        parts = prefill_parts(context, others, assignment.costs.model)
        best_s = min((queue_s + load_s + exec_s for queue_s, load_s, exec_s, _, _ in parts), default=seconds)
        return PrefillReport(seconds, self._error, max(0.0, seconds - best_s))
