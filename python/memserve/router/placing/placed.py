"""A request on its way: where it was sent, and what was believed then. A plain record."""

from __future__ import annotations

from dataclasses import dataclass

from memserve.router.cluster.instance import Instance, Pair, Route
from memserve.router.placing.decision import Decision
from memserve.router.placing.fetching import FetchOutcome, FetchPlan
from memserve.router.text.prompts import Prompt


@dataclass(slots=True)
class Placed:
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
