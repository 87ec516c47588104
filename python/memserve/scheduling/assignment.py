"""A dispatched request: the instances that serve it, and the predictions for it. A plain record."""

from __future__ import annotations

from dataclasses import dataclass

from memserve.core.block_addr import LOCAL_TIERS
from memserve.core.ids import InstanceId
from memserve.scheduling.context import Prompt
from memserve.scheduling.cost_model.online import OnlineCostModel
from memserve.scheduling.decision import Decision
from memserve.scheduling.fetch_planner import FetchOutcome, FetchPlan, fetch_gain_s
from memserve.scheduling.request_cost import load_s


@dataclass(slots=True)
class Assignment:
    """A request that instances serve. Changed by `InstanceSelector` only."""

    number: int
    decision: Decision
    prompt: Prompt
    costs: OnlineCostModel
    """The costs of the model that serves the request, which its prefill refines."""
    plan: FetchPlan | None
    """The fetch that precedes it."""
    begun_s: float
    work_s: float
    """Predicted time of its own prefill, without the queue."""
    had_queue: bool
    """Its prefill had other requests waiting or at work when it came."""
    is_prefilled: bool = False
    prefilled_s: float | None = None
    """When its first token came; None if that was not noticed at once."""
    fetched: FetchOutcome | None = None
    cached_tokens: int | None = None
    """Cached tokens that its prefill reports."""

    @property
    def prefill(self) -> InstanceId:
        """The instance that computes the prompt."""
        return self.decision.prefill

    @property
    def decode(self) -> InstanceId:
        """The instance that decodes: the prefill itself if it is colocated."""
        return self.decision.decode or self.decision.prefill

    def benefits_from(self, plan: FetchPlan) -> bool:
        """Whether to wait for `plan`, the fetch of another request, because it brings blocks of this prompt.

        By Eq. 2: the cost is the whole transfer, the saving only the blocks of this prompt.
        """
        if plan.target != self.decision.prefill or len(self.prompt.chains) != 1:
            return False
        context, costs = self.decision.context, self.decision.costs
        before, after = (
            costs.exec_s(context.prompt_tokens, context.cached_tokens(num_blocks))
            for num_blocks in (plan.num_there, max(plan.num_there, plan.num_shared(self.prompt.chains[0])))
        )
        return fetch_gain_s(before - after, plan.transfer_s, self.decision.chosen.queued_s) > 0

    def tokens_by_tier(self) -> tuple[tuple[int, ...], int]:
        """The prompt's tokens in each tier of the prefill, as the tree has it, and the tokens to fetch."""
        context, depths = self.decision.context, self.decision.chosen.depths
        ends = [0, *map(context.cached_tokens, depths)]
        planned = 0 if self.plan is None else context.cached_tokens(len(self.plan.keys))
        return tuple(ends[i + 1] - ends[i] for i in LOCAL_TIERS), max(planned - ends[-1], 0)


def work_s_of(decision: Decision, plan: FetchPlan | None) -> float:
    """Predicted time of the request's own prefill, after `plan`."""
    context, costs = decision.context, decision.costs
    depths = decision.chosen.depths
    if plan is not None:  # all cached blocks count as loaded from DRAM, where fetches arrive
        depths = (0,) + (len(plan.keys),) * (len(depths) - 1)
    return costs.exec_s(context.prompt_tokens, context.cached_tokens(depths[-1])) + load_s(
        context, depths, costs
    )
