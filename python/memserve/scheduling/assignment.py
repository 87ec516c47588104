"""A request on its way: where it was sent, and what was believed then. A plain record."""

from __future__ import annotations

from dataclasses import dataclass

from memserve.router.cluster.instance import ClusterSnapshot, Instance, Pair, Route, Single
from memserve.router.proxy.fetcher import FetchOutcome, FetchPlan
from memserve.router.tokenization.prompts import Prompt
from memserve.scheduling.decision import Decision, fetch_gain_s
from memserve.wire.messages import Role


@dataclass(slots=True)
class Assignment:
    """A request that has been given to instances. Changed by `Placer` only."""

    number: int
    decision: Decision
    prompt: Prompt
    route: Route
    plan: FetchPlan | None
    """What to fetch before it goes out."""
    begun_s: float
    work_s: float
    """Predicted, without the wait for others."""
    had_queue: bool
    """Others were waiting or at work when it came."""
    is_prefilled: bool = False
    prefilled_s: float | None = None
    """When its first token came, where that was noticed at once."""
    fetched: FetchOutcome | None = None
    cached_tokens: int | None = None
    """What its prefill says it had."""

    @property
    def instances(self) -> tuple[Instance, ...]:
        """All that work on it."""
        route = self.route
        return (route.prefill, route.decode) if isinstance(route, Pair) else (route.worker,)

    @property
    def prefill(self) -> Instance:
        return self.route.prefill if isinstance(self.route, Pair) else self.route.worker

    @property
    def decode(self) -> Instance:
        return self.route.decode if isinstance(self.route, Pair) else self.route.worker


def route_of(snapshot: ClusterSnapshot, decision: Decision) -> Route:
    prefill = snapshot.get(decision.prefill)
    if prefill.role is Role.COLOCATED:
        return Single(prefill)
    assert decision.decode is not None
    return Pair(prefill, snapshot.get(decision.decode))


def benefits_from(placed: Assignment, plan: FetchPlan) -> bool:
    """Whether to wait for what `plan`, another request's, brings: it was sent there because of it.

    As Eq. 2, for the whole transfer and what it brings of this prompt.
    """
    if plan.target != placed.decision.prefill or len(placed.prompt.chains) != 1:
        return False
    situation, costs = placed.decision.situation, placed.decision.costs
    there, then = (
        costs.exec_s(situation.prompt_tokens, situation.cached_tokens(num_blocks))
        for num_blocks in (plan.num_there, max(plan.num_there, plan.num_shared(placed.prompt.chains[0])))
    )
    return fetch_gain_s(there - then, plan.transfer_s, placed.decision.chosen.queued_s) > 0


def work_s_by_instance(decision: Decision, plan: FetchPlan | None) -> float:
    """What this request's own prefill will take, by the prediction."""
    situation, costs = decision.situation, decision.costs
    if plan is not None:
        num_cached = num_loaded = situation.cached_tokens(len(plan.keys))
    else:
        num_cached = situation.cached_tokens(decision.chosen.total_blocks)
        num_loaded = num_cached - situation.cached_tokens(decision.chosen.near_blocks)
    return costs.exec_s(situation.prompt_tokens, num_cached) + costs.load_s(num_loaded)
