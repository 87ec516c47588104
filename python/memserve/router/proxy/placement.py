"""Places requests: feeds the pure selector from the router's pools and prompt tree, and reports its results.

    snapshot, pools ──> Targets ──> InstanceSelector ──> Decision, Assignment ──> Placement

Knows no HTTP. Event loop thread only; the clock is given.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from memserve.core.block_keys import BlockKey
from memserve.core.ids import InstanceId, pool_name
from memserve.router.cluster.instance import ClusterSnapshot, Instance, Pair, Route, Single
from memserve.router.cluster.pools import Pools
from memserve.router.kv_events.synchronizer import TreeSynchronizer
from memserve.router.proxy.fetcher import Links, links_between
from memserve.router.tokenization.text_keys import BLOCK_TOKENS
from memserve.scheduling.assignment import Assignment
from memserve.scheduling.context import Candidate, Prompt
from memserve.scheduling.cost_model.online import OnlineCostModel
from memserve.scheduling.decision import Decision
from memserve.scheduling.fetch_planner import FetchOutcome
from memserve.scheduling.prediction_error import PrefillReport
from memserve.scheduling.selector import InstanceSelector, SelectorConfig, Targets
from memserve.wire.messages import Role


class CacheObserver(Protocol):
    """Infers the caches of workers that do not report theirs in full."""

    def record_prompt(self, keys: Sequence[BlockKey]) -> None:
        """A prompt with these blocks was placed."""

    def record_answer(self, instance: InstanceId, keys: Sequence[BlockKey]) -> None:
        """The instance has computed, or received, these blocks."""

    def is_approximate(self, instance: InstanceId) -> bool:
        """Whether the requests that the instance answered are all that is known of its cache."""


class PlacementObserver(Protocol):
    """Receives the outcomes of placements."""

    def count_placement(self, instances: Sequence[Instance], assignment: Assignment) -> None:
        """A request was placed on these instances."""

    def count_fetch(self, outcome: str, seconds: float | None = None, num_blocks: int = 0) -> None:
        """A fetch before dispatch ended, with so many blocks, or was impossible, or shared."""

    def count_prefill(self, prompt: Prompt, cached_tokens: int | None, report: PrefillReport | None) -> None:
        """A prefill ended. `cached_tokens` None: not reported. `report` None: its time is not known."""


@dataclass(frozen=True, slots=True)
class Placement:
    """A request with the instances that serve it."""

    assignment: Assignment
    route: Route
    links: Links
    """The pools between which the assignment's fetch moves blocks, by rank; empty if there is no fetch."""

    @property
    def instances(self) -> tuple[Instance, ...]:
        """All instances that serve the request."""
        route = self.route
        return (route.prefill, route.decode) if isinstance(route, Pair) else (route.worker,)

    @property
    def prompt(self) -> Prompt:
        """The request as the scheduler sees it."""
        return self.assignment.prompt

    @property
    def decision(self) -> Decision:
        """Why it was placed here."""
        return self.assignment.decision


class GlobalScheduler:
    """Places requests on the ready instances."""

    def __init__(
        self,
        config: SelectorConfig,
        synchronizer: TreeSynchronizer,
        pools: Pools,
        observer: CacheObserver,
        placements: PlacementObserver,
        clock: Callable[[], float],
    ) -> None:
        self._selector = InstanceSelector(config, synchronizer.synced_tree)
        self._pools = pools
        self._observer = observer
        self._placements = placements
        self._clock = clock

    @property
    def costs(self) -> Mapping[str, OnlineCostModel]:
        """The costs learned so far, by model."""
        return self._selector.costs

    def decide(self, snapshot: ClusterSnapshot, prompt: Prompt) -> Decision | None:
        """Where a request would go now; None if the snapshot has neither a pair nor a colocated instance."""
        return self._selector.decide(self._targets(snapshot, prompt), prompt, self._clock())

    def place(self, snapshot: ClusterSnapshot, prompt: Prompt) -> Placement | None:
        """Choose instances for a request and count it as their work; None as `decide`."""
        targets, now_s = self._targets(snapshot, prompt), self._clock()
        decision = self._selector.decide(targets, prompt, now_s)
        if decision is None:
            return None
        links: Links = ()
        if decision.fetch is not None:
            links = links_between(self._pools, decision.prefill, decision.fetch.source)
            if not links:
                self._placements.count_fetch("impossible")
        assignment = self._selector.assign(decision, targets, prompt, now_s, can_fetch=bool(links))
        placement = Placement(assignment, _route_of(snapshot, decision), links)
        if not prompt.by_text:
            for chain in prompt.chains:
                self._observer.record_prompt(chain)
        self._placements.count_placement(placement.instances, assignment)
        return placement

    def waited(self, seconds: float) -> None:
        """A request has waited for the fetch of another request, which brought its blocks too."""
        self._placements.count_fetch("shared", seconds)

    def fetched(self, placement: Placement, outcome: FetchOutcome) -> None:
        """The fetch of a placement is over."""
        plan = placement.assignment.plan
        assert plan is not None
        num_new = self._selector.fetched(placement.assignment, outcome)
        is_whole = outcome.num_blocks >= len(plan.keys)
        self._placements.count_fetch(
            "whole" if is_whole else "part" if num_new else "none", outcome.seconds, num_new
        )

    def sent(self, placement: Placement) -> None:
        """The request is sent to its instances now."""
        self._selector.sent(placement.assignment, self._clock())

    def prefilled(self, placement: Placement, cached_tokens: int | None, *, is_timely: bool = True) -> None:
        """The first token has come; the prefill had `cached_tokens` of the prompt, if it reports that.

        `is_timely`: it came just now, not some time ago. Idempotent.
        """
        assignment = placement.assignment
        if not assignment.is_prefilled:
            report = self._selector.prefilled(assignment, cached_tokens, self._clock(), is_timely=is_timely)
            self._placements.count_prefill(assignment.prompt, cached_tokens, report)

    def ended(self, placement: Placement, *, is_answered: bool) -> None:
        """No instance works on the request any more. Idempotent."""
        assignment = placement.assignment
        self._selector.ended(assignment, self._clock())
        if is_answered:
            for chain in assignment.prompt.chains:
                for instance in dict.fromkeys((assignment.prefill, assignment.decode)):
                    self._observer.record_answer(instance, chain)

    def num_running(self, instance: InstanceId) -> int:
        """Number of requests that were placed on the instance and have not ended."""
        return self._selector.num_running(instance)

    def load(self, instance: InstanceId) -> Candidate:
        """The instance's load as a policy sees it."""
        return self._selector.load(instance, self._clock())

    def retain(self, instances: Collection[InstanceId]) -> None:
        """Forget the load of all other instances."""
        self._selector.retain(instances, self._clock())

    def _targets(self, snapshot: ClusterSnapshot, prompt: Prompt) -> Targets:
        """The instances of the snapshot as the selector sees them."""
        prefills = (*(snapshot.prefills if snapshot.decodes else ()), *snapshot.colocated)
        if not prefills:
            return Targets((), (), (), "", False, 1, None, False)
        first = prefills[0]
        info, pools = first.server_info, self._pools.of(first.instance_id)
        kv_bytes_per_token = None
        if pools and pools[0].block_bytes and info.page_size:
            kv_bytes_per_token = pools[0].block_bytes // info.page_size
        holders = []
        if memories := self._pools.memories():
            layouts = {pool.layout for pool in pools if pool.rank == 0}
            holders = [(name, pool_name(name, layout)) for name in memories for layout in layouts]
        return Targets(
            prefills,
            snapshot.decodes,
            holders,
            info.model,
            info.is_on_cpu,
            BLOCK_TOKENS if prompt.by_text else info.page_size or 1,
            kv_bytes_per_token,
            not prompt.by_text or self._observer.is_approximate(first.instance_id),
        )


def _route_of(snapshot: ClusterSnapshot, decision: Decision) -> Route:
    prefill = snapshot.get(decision.prefill)
    if prefill.role is Role.COLOCATED:
        return Single(prefill)
    assert decision.decode is not None
    return Pair(prefill, snapshot.get(decision.decode))
