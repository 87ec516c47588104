"""From what is known of a request to where it goes, and what its way teaches about the next ones.

    decide   prompt tree + ledger + costs ──> RoutingContext ──> Decision          (changes nothing)
    place    the same, entered in the ledger and expected in the tree ──> Assignment
    fetched, prefilled, ended: settle the ledger, refine the costs, count

Knows no HTTP. Event loop thread only; the clock is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import add
from typing import Protocol

import msgspec

from memserve.core.block_keys import BlockKey
from memserve.core.ids import InstanceId
from memserve.router.cluster.instance import ClusterSnapshot, Instance
from memserve.router.cluster.pools import Pools
from memserve.router.kv_events.synchronizer import TreeSynchronizer
from memserve.router.observability.metrics import RouterMetrics
from memserve.router.proxy.fetcher import FetchOutcome
from memserve.router.tokenization.prompts import Prompt
from memserve.router.tokenization.text_keys import BLOCK_TOKENS
from memserve.scheduling.assignment import Assignment, route_of, work_s_by_instance
from memserve.scheduling.context import Candidate, RoutingContext
from memserve.scheduling.cost_model.busy_periods import BusyPeriods
from memserve.scheduling.cost_model.model import CPU_COSTS, GPU_COSTS, CostModel
from memserve.scheduling.cost_model.online import OnlineCostModel
from memserve.scheduling.cost_model.prediction_error import PredictionError, update_costs, work_of
from memserve.scheduling.decision import Decision, decide, fetching_at_most
from memserve.scheduling.fetch_planner import FetchPlanner
from memserve.scheduling.load_tracker import LoadTracker
from memserve.scheduling.policies import find_policy
from memserve.scheduling.prompt_tree.records import NO_OVERLAP, Overlap, by_server

WINDOW_S = 180.0
"""How long work counts as recent."""
EXPECT_S = 30.0
"""How much later than predicted a prompt may be reported and is still expected."""
MAX_HOLDERS = 3
"""How many holders are looked at to fetch from, when they have less in DRAM than in HBM."""


@dataclass(frozen=True, slots=True)
class SelectorConfig:
    """How requests are placed."""

    prefill_policy: str
    decode_policy: str
    start_costs: CostModel | None
    """None: what is usual for the machines that serve a model."""
    certainty: float
    """Of those costs, 0 to 1."""
    fetches: bool
    """Whether history may be fetched before a request goes out."""


class CacheObserver(Protocol):
    """Follows the caches of workers that do not report theirs in full."""

    def know(self, keys: Sequence[BlockKey]) -> None:
        """A prompt with these blocks came by."""

    def answered(self, instance: InstanceId, keys: Sequence[BlockKey]) -> None:
        """That instance has computed, or received, these blocks."""

    def believes(self, instance: InstanceId) -> bool:
        """Whether what it answered is all that is known of its cache."""


class InstanceSelector:
    """Places requests on the ready instances."""

    def __init__(
        self,
        settings: SelectorConfig,
        feed: TreeSynchronizer,
        pools: Pools,
        learner: CacheObserver,
        metrics: RouterMetrics,
        clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._feed = feed
        self._pools = pools
        self._learner = learner
        self._metrics = metrics
        self._clock = clock
        self._ledger = LoadTracker(WINDOW_S)
        self._costs: dict[str, OnlineCostModel] = {}
        self._turn = 0
        self._last: dict[InstanceId, int] = {}
        """The request that each prefill was given last."""
        self._hindsight = PredictionError(metrics)
        self._planner = FetchPlanner(feed, pools, metrics)
        self._busy = BusyPeriods()

    @property
    def costs(self) -> Mapping[str, OnlineCostModel]:
        """What has been learnt, by model."""
        return self._costs

    def decide(self, snapshot: ClusterSnapshot, prompt: Prompt) -> Decision | None:
        """Where a request would go now; None if no pair is whole and nobody does both."""
        prefills = (*(snapshot.prefills if snapshot.decodes else ()), *snapshot.colocated)
        if not prefills:
            return None
        settings = self._settings
        decision = decide(
            self._situation(prefills, snapshot.decodes, prompt),
            self._costs_of(prefills[0]).model,
            *self._policies(prompt, prefills[0].instance_id),
            can_fetch=settings.fetches and len(prompt.chains) == 1 and not prompt.by_text,
        )
        for _ in range(MAX_HOLDERS):
            if decision.fetch is None or (less := self._planner.offers_less(decision, prompt)) is None:
                return decision
            decision = fetching_at_most(decision, decision.fetch.source, less)
        return msgspec.structs.replace(decision, fetch=None)

    def place(self, snapshot: ClusterSnapshot, prompt: Prompt) -> Assignment | None:
        """Where it goes, entered as work there; None as `decide`."""
        decision = self.decide(snapshot, prompt)
        if decision is None:
            return None
        now_s, route = self._clock(), route_of(snapshot, decision)
        plan = self._planner.plan(decision, prompt)
        placed = Assignment(
            number=self._turn,
            decision=decision,
            prompt=prompt,
            route=route,
            plan=plan,
            begun_s=now_s,
            work_s=work_s_by_instance(decision, plan),
            had_queue=self._ledger.num_queued(decision.prefill) > 0,
        )
        self._turn += 1
        self._enter(placed)
        return placed

    def waited(self, seconds: float) -> None:
        """Another request's fetch, of blocks that a request needs, is over."""
        self._metrics.fetches.labels("shared").inc()
        self._metrics.fetch_seconds.observe(seconds)

    def fetched(self, placed: Assignment, outcome: FetchOutcome) -> None:
        """Its fetch is over."""
        plan, wanted = placed.plan, placed.decision.fetch
        assert plan is not None
        assert wanted is not None
        num_new = outcome.num_blocks - plan.num_there
        is_whole = outcome.num_blocks >= wanted.num_blocks
        self._metrics.fetches.labels("whole" if is_whole else "part" if num_new > 0 else "none").inc()
        self._metrics.fetch_seconds.observe(outcome.seconds)
        if num_new > 0:
            self._metrics.fetched_blocks.inc(num_new)
        if is_whole and num_new > 0:
            num_tokens = num_new * placed.decision.situation.page_tokens
            self._costs_of(placed.prefill).fetched(num_tokens, outcome.seconds)
        placed.fetched = outcome

    def sent(self, placed: Assignment) -> None:
        """It goes out now."""
        placed.begun_s = self._clock()
        self._busy.sent(placed.decision.prefill, placed.number, placed.begun_s)

    def prefilled(self, placed: Assignment, cached_tokens: int | None, *, is_timely: bool = True) -> None:
        """Its first token is there; prefill had `cached_tokens` of it, if it says so. Idempotent.

        `is_timely`: just now, not some time ago.
        """
        if placed.is_prefilled:
            return
        placed.is_prefilled = True
        now_s = self._clock()
        if is_timely:
            placed.prefilled_s = now_s
        self._ledger.prefill_done(placed.decision.prefill, placed.number, now_s)
        if cached_tokens is not None:
            placed.cached_tokens = cached_tokens
            self._metrics.cached_tokens.inc(cached_tokens)
            self._metrics.told_tokens.inc(placed.prompt.num_tokens)
        costs = self._costs_of(placed.prefill)
        work = work_of(placed, cached_tokens) if is_timely else None
        if (busy := self._busy.done(placed.decision.prefill, placed.number, work, now_s)) is not None:
            costs.worked(*busy)
        if not is_timely:
            return
        seconds = now_s - placed.begun_s
        self._metrics.prefill_seconds.observe(seconds)
        is_alone = not placed.had_queue and self._last.get(placed.decision.prefill) == placed.number
        if is_alone:
            update_costs(placed, seconds, cached_tokens, costs)
        self._hindsight.reckon(placed, seconds, costs.model)

    def ended(self, placed: Assignment, *, is_answered: bool) -> None:
        """Nobody works on it any more. Idempotent."""
        now_s = self._clock()
        self._ledger.prefill_done(placed.decision.prefill, placed.number, now_s)
        self._busy.done(placed.decision.prefill, placed.number, None, now_s)
        self._ledger.decode_done(placed.decode.instance_id, placed.number)
        if is_answered:
            for chain in placed.prompt.chains:
                for instance in dict.fromkeys((placed.prefill.instance_id, placed.decode.instance_id)):
                    self._learner.answered(instance, chain)

    def num_running(self, instance: InstanceId) -> int:
        """How many of the requests that were placed there it has still to work on."""
        return self._ledger.num_running(instance)

    def load(self, instance: InstanceId) -> Candidate:
        """What is dispatched to it and not done, as a policy sees it."""
        return self._ledger.candidate(instance, NO_OVERLAP, self._clock())

    def keep(self, instances: Sequence[InstanceId]) -> None:
        """Forget the work of instances that are not there any more."""
        self._ledger.keep(frozenset(instances), self._clock())
        self._busy.keep(frozenset(instances))
        for gone in self._last.keys() - set(instances):
            del self._last[gone]

    # ---- before

    def _policies(self, prompt: Prompt, prefill: InstanceId) -> tuple[str, str]:
        """Of prefill and of decode; a prompt of unknown keys stays with its session, if it names one."""
        chosen = self._settings.prefill_policy, self._settings.decode_policy
        if prompt.session is None or (prompt.chains and self._can_name(prefill, prompt)):
            return chosen
        if prompt.unknown is None and not prompt.by_text:
            return chosen
        prefill_policy, decode_policy = (
            "session" if "tokens" in find_policy(name).needs else name for name in chosen
        )
        return prefill_policy, decode_policy

    def _can_name(self, instance: InstanceId, prompt: Prompt) -> bool:
        """Whether the blocks of an instance are known by this prompt's kind of keys."""
        return not prompt.by_text or self._learner.believes(instance)

    def _situation(
        self, prefills: Sequence[Instance], decodes: Sequence[Instance], prompt: Prompt
    ) -> RoutingContext:
        depths, now_s = self._depths(prompt), self._clock()

        def candidates(instances: Sequence[Instance]) -> tuple[Candidate, ...]:
            candidate, get, no = self._ledger.candidate, depths.get, NO_OVERLAP
            return tuple(candidate(it.instance_id, get(it.instance_id, no), now_s) for it in instances)

        memories = (
            Candidate(name, total_blocks=depths[inside].cached)
            for name in self._pools.memories()
            for inside in self._planner.names_of(name, prefills[0].instance_id)
            if inside in depths
        )
        return RoutingContext(
            prompt.num_tokens,
            BLOCK_TOKENS if prompt.by_text else prefills[0].server_info.page_size or 1,
            candidates(prefills),
            candidates(decodes),
            holders=tuple(memories),
            session=prompt.session,
            turn=self._turn,
            output_tokens=prompt.output_tokens,
        )

    def _depths(self, prompt: Prompt) -> Mapping[InstanceId, Overlap]:
        """Of a batch, the sum over its prompts."""
        tree = self._feed.tree
        if len(prompt.chains) == 1:
            return by_server(tree.overlaps(prompt.chains[0]))
        sums: dict[InstanceId, Overlap] = {}
        for chain in prompt.chains:
            for instance, depth in by_server(tree.overlaps(chain)).items():
                known = sums.get(instance, NO_OVERLAP)
                sums[instance] = Overlap(
                    tuple(map(add, known.depths, depth.depths)), known.readable + depth.readable
                )
        return sums

    def _enter(self, placed: Assignment) -> None:
        prompt = placed.prompt
        prefill, decode = placed.prefill.instance_id, placed.decode.instance_id
        self._ledger.prefill_dispatched(prefill, placed.number, placed.work_s, placed.begun_s)
        self._ledger.decode_dispatched(decode, placed.number, prompt.num_tokens)
        self._last[prefill] = placed.number
        until_s = placed.begun_s + placed.decision.chosen.queued_s + placed.work_s + EXPECT_S
        for instance in (prefill, decode) if decode != prefill else (prefill,):
            if self._feed.tree.follows(instance):
                for chain in prompt.chains:
                    self._feed.tree.expect(instance, chain, until_s)
        if not prompt.by_text:
            for chain in prompt.chains:
                self._learner.know(chain)
        metrics = self._metrics
        metrics.placed.labels(prefill, placed.prefill.role).inc()
        if decode != prefill:
            metrics.placed.labels(decode, placed.decode.role).inc()
        metrics.prompt_tokens.inc(prompt.num_tokens)
        self._count_tiers(placed, prompt)
        if prompt.unknown is not None:
            metrics.unknown_tokens.labels(prompt.unknown).inc()

    def _count_tiers(self, placed: Assignment, prompt: Prompt) -> None:
        """Where its tokens were seen for the prefill it goes to."""
        metrics, situation, chosen = self._metrics, placed.decision.situation, placed.decision.chosen
        after = 0
        if chosen.total_blocks or placed.plan is not None:
            near, total = map(situation.cached_tokens, (chosen.near_blocks, chosen.total_blocks))
            planned = 0 if placed.plan is None else situation.cached_tokens(len(placed.plan.keys))
            after = max(total, planned)
            metrics.expected_tokens.inc(total)
            metrics.hbm_tokens.inc(near)
            metrics.dram_tokens.inc(total - near)
            metrics.remote_tokens.inc(after - total)
        metrics.computed_tokens.inc(prompt.num_tokens - after)

    def _costs_of(self, instance: Instance) -> OnlineCostModel:
        """Of the model that the instance serves."""
        facts = instance.server_info
        costs = self._costs.get(facts.model)
        if costs is None:
            usual = CPU_COSTS if facts.is_on_cpu else GPU_COSTS
            costs = OnlineCostModel(self._settings.start_costs or usual, certainty=self._settings.certainty)
            self._costs[facts.model] = costs
        pools = self._pools.of(instance.instance_id)
        if pools and pools[0].block_bytes and facts.page_size:
            costs.has_block_bytes(pools[0].block_bytes, facts.page_size)
        return costs
