"""A cluster simulated over a trace, under the router's own policies and cost model.

    arrival -> decide -> [fetch] -> queue -> prefill -> [transfer] -> decode -> end
                 ^                              |
                 `--- index <- events, late or lost

Two settings. Without times a prompt is cached as soon as it is placed, and an instance's load is the
uncached tokens placed there lately. With times the cost model says how long each arrow takes.
Knows no files, flags or plots. Every random draw comes from the seed.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from itertools import count
from random import Random

from memserve.core.block_addr import Tier
from memserve.core.block_keys import BlockKey
from memserve.core.cache_events import CacheEvent, Removed, Snapshot, Stored
from memserve.core.errors import ConfigError
from memserve.core.ids import Epoch, InstanceId
from memserve.scheduling.context import RoutingContext
from memserve.scheduling.cost_model.model import (
    GPU_COSTS,
    TOKEN_COSTS,
    CostModel,
    Observation,
    PrefillCost,
    RlsState,
    rls_update,
    with_prefill,
)
from memserve.scheduling.decision import Decision, FetchChoice, decide
from memserve.scheduling.load_tracker import LoadTracker
from memserve.scheduling.policies import find_policy
from memserve.scheduling.prompt_tree.records import NO_OVERLAP, Overlap
from memserve.scheduling.prompt_tree.tree import GlobalPromptTree
from memserve.simulation.cache import PromptCache
from memserve.simulation.engine import SimulatedInstance, SimulatedRequest
from memserve.simulation.traces import Request, Trace

WINDOW_S = 180.0
"""For how long dispatched work counts as recent."""

EXPECT_S = 60.0
"""For how long a dispatched prompt counts as cached though nothing was heard of it."""

EPOCH = Epoch(1)
"""Nobody restarts here."""


@dataclass(frozen=True, slots=True)
class SimulationConfig:
    """What to simulate. Checked when built."""

    instances: int = 4
    """Prefill instances; colocated ones if there are no decodes."""
    decodes: int = 0
    capacity_tokens: int | None = None
    """Cache of each instance; None: without end."""
    policy: str = "prompt_tree"
    decode_policy: str = "prompt_tree"
    timed: bool = False
    can_fetch: bool = True
    """Only with times: nothing prices a transfer without them."""
    speed: float = 1.0
    """The trace's clock runs that many times faster than its requests' work."""
    staleness_s: float = 0.0
    """How late the router learns what is cached."""
    event_loss: float = 0.0
    """Which share of the events never arrives; the gap is noticed at the next one."""
    cost_error: float = 1.0
    """The router begins by believing that prefills take so many times what they do, and learns."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.instances < 1 or self.decodes < 0:
            raise ConfigError("there is at least one instance, and no negative number of decodes")
        for name in (self.policy, self.decode_policy):
            find_policy(name)
        if self.capacity_tokens is not None and self.capacity_tokens < 1:
            raise ConfigError("a cache has room for at least one token")
        if min(self.speed, self.cost_error) <= 0 or self.staleness_s < 0 or not 0 <= self.event_loss <= 1:
            raise ConfigError(
                "speed and cost error are above 0, staleness is not below, and event loss is a share of 1"
            )


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of each request, in order of arrival."""

    config: SimulationConfig
    trace: Trace
    jobs: tuple[SimulatedRequest, ...]
    prefills: tuple[InstanceId, ...]
    num_resyncs: int
    refined: RlsState
    """What the router has learnt of prefills; of none if it was right from the beginning."""


class Simulation:
    """One run. Use `simulate`."""

    def __init__(self, trace: Trace, config: SimulationConfig, costs: CostModel) -> None:
        self._trace, self._config = trace, config
        self._costs = costs if config.timed else TOKEN_COSTS
        self._refined = RlsState.of(
            PrefillCost(*(value * config.cost_error for value in astuple(self._costs.prefill)))
        )
        self._believed = with_prefill(self._costs, self._refined.cost)
        self._random = Random(config.seed)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._now_s = 0.0
        self._ended: list[SimulatedRequest] = []
        self._index = GlobalPromptTree(clock=lambda: self._now_s)
        self._ledger = LoadTracker(WINDOW_S)
        self._resyncing: set[InstanceId] = set()
        self._num_resyncs = 0
        role = "prefill" if config.decodes else "worker"
        self._prefills = [self._instance(f"{role}{i}") for i in range(config.instances)]
        self._decodes = [self._instance(f"decode{i}") for i in range(config.decodes)]
        self._instances = {it.instance_id: it for it in (*self._prefills, *self._decodes)}

    def run(self, arrivals: Iterable[Request]) -> Outcome:
        """Simulate until the last request has ended; `arrivals` are the trace's, perhaps counted."""
        for request in arrivals:
            arrival_s = request.arrival_s / self._config.speed
            self._run_until(arrival_s)
            self._now_s = arrival_s
            self._arrive(request)
        self._run_until(float("inf"))
        self._ended.sort(key=lambda job: job.request.number)
        names = tuple(it.instance_id for it in self._prefills)
        return Outcome(self._config, self._trace, tuple(self._ended), names, self._num_resyncs, self._refined)

    def _instance(self, name: str) -> SimulatedInstance:
        capacity = self._config.capacity_tokens
        block_tokens = self._trace.block_tokens
        cache = PromptCache(None if capacity is None else max(capacity // block_tokens, 1))
        instance = SimulatedInstance(InstanceId(name), self._costs, cache, block_tokens)
        self._index.join(instance.instance_id, EPOCH)
        return instance

    def _at(self, when_s: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when_s, next(self._order), what))

    def _run_until(self, limit_s: float) -> None:
        while self._events and self._events[0][0] <= limit_s:
            self._now_s, _, what = heapq.heappop(self._events)
            what()

    # A request's way.

    def _arrive(self, request: Request) -> None:
        decision, depths = self._decide(request)
        job = SimulatedRequest(request, decision.prefill, decision.decode or decision.prefill)
        tokens = decision.situation.prompt_tokens
        known = depths.get(decision.prefill, NO_OVERLAP).cached
        if decision.fetch:
            known = decision.fetch.num_blocks
        job.predicted_s = self._believed.exec_s(tokens, decision.situation.cached_tokens(known))
        self._index.expect(decision.prefill, request.keys, self._now_s + EXPECT_S)
        if not self._config.timed:
            self._ledger.placed(decision.prefill, job.predicted_s, self._now_s)
            self._place(job)
            return
        self._ledger.prefill_dispatched(decision.prefill, request.number, job.predicted_s, self._now_s)
        self._ledger.decode_dispatched(job.decode, request.number, tokens)
        if decision.fetch:
            self._fetch(job, decision.fetch)
        else:
            self._queue(job)

    def _decide(self, request: Request) -> tuple[Decision, dict[InstanceId, Overlap]]:
        depths = self._index.overlaps(request.keys)
        prefills, decodes = (
            tuple(
                self._ledger.candidate(it.instance_id, depths.get(it.instance_id, NO_OVERLAP), self._now_s)
                for it in instances
            )
            for instances in (self._prefills, self._decodes)
        )
        config = self._config
        situation = RoutingContext(
            request.prompt_tokens,
            self._trace.block_tokens,
            prefills,
            decodes,
            session=request.session,
            turn=request.number,
            seed=config.seed,
        )
        can_fetch = config.can_fetch and config.timed
        return decide(situation, self._believed, config.policy, config.decode_policy, can_fetch), depths

    def _place(self, job: SimulatedRequest) -> None:
        """Without times: the prompt is computed and cached at once."""
        job.first_token_s = job.end_s = self._now_s
        tokens = job.request.prompt_tokens
        job.hit_blocks = self._insert(self._instances[job.prefill], job.request.keys)
        job.work_tokens = tokens - min(job.hit_blocks * self._trace.block_tokens, tokens - 1)
        self._ended.append(job)

    def _fetch(self, job: SimulatedRequest, fetch: FetchChoice) -> None:
        """The request waits for the blocks, as many as there really are."""
        target = self._instances[job.prefill]
        there = self._instances[fetch.source].cache.depth(job.request.keys)
        here = target.cache.depth(job.request.keys)
        job.fetched_blocks = max(there - here, 0)
        num_tokens = job.fetched_blocks * self._trace.block_tokens
        duration_s = self._costs.transfer_s(num_tokens, fetch.source, job.prefill)
        self._at(self._now_s + duration_s, partial(self._fetched, job, there))

    def _fetched(self, job: SimulatedRequest, num_blocks: int) -> None:
        self._insert(self._instances[job.prefill], job.request.keys[:num_blocks])
        self._queue(job)

    def _queue(self, job: SimulatedRequest) -> None:
        instance = self._instances[job.prefill]
        instance.prefills.add(job)
        self._begin_prefill(instance)

    def _begin_prefill(self, instance: SimulatedInstance) -> None:
        begun = instance.prefills.begin()
        if begun is not None:
            job, duration_s = begun
            self._at(self._now_s + duration_s, partial(self._prefilled, job, instance, duration_s))

    def _prefilled(self, job: SimulatedRequest, instance: SimulatedInstance, duration_s: float) -> None:
        instance.prefills.end()
        if self._config.cost_error != 1:
            tokens = job.request.prompt_tokens
            self._refined = rls_update(
                self._refined, Observation(tokens, tokens - job.work_tokens, duration_s)
            )
            self._believed = with_prefill(self._costs, self._refined.cost)
        self._insert(instance, job.request.keys)
        self._ledger.prefill_done(job.prefill, job.request.number, self._now_s)
        self._begin_prefill(instance)
        if job.decode == job.prefill:
            self._handed_over(job)
            return
        there = self._instances[job.decode].cache.depth(job.request.keys) * self._trace.block_tokens
        num_tokens = max(job.request.prompt_tokens - there, 0)
        duration_s = self._costs.transfer_s(num_tokens, job.prefill, job.decode, Tier.HBM)
        self._at(self._now_s + duration_s, partial(self._handed_over, job))

    def _handed_over(self, job: SimulatedRequest) -> None:
        """Prefill's first token goes out from where the others will be decoded."""
        job.first_token_s = self._now_s
        instance = self._instances[job.decode]
        if job.decode != job.prefill:
            self._insert(instance, job.request.keys)
        instance.decodes.add(job, self._now_s)
        self._foretell_end(instance)

    def _foretell_end(self, instance: SimulatedInstance) -> None:
        end_s = instance.decodes.next_end_s()
        if end_s is not None:
            self._at(end_s, partial(self._decoded, instance, instance.decodes.version))

    def _decoded(self, instance: SimulatedInstance, version: int) -> None:
        if version != instance.decodes.version:
            return
        job = instance.decodes.take_ended(self._now_s)
        job.end_s = self._now_s
        self._ledger.decode_done(job.decode, job.request.number)
        self._ended.append(job)
        self._foretell_end(instance)

    # What the router hears of it.

    def _insert(self, instance: SimulatedInstance, keys: Sequence[BlockKey]) -> int:
        """Cache a prompt and tell of it; how much of it had been there."""
        before, evicted = instance.cache.insert(keys)
        if before < len(keys):
            parent = keys[before - 1] if before else None
            self._tell(instance, Stored(instance.sequence + 1, Tier.HBM, parent, tuple(keys[before:])))
        if evicted:
            self._tell(instance, Removed(instance.sequence + 1, Tier.HBM, tuple(evicted)))
        return before

    def _tell(self, instance: SimulatedInstance, event: CacheEvent) -> None:
        instance.sequence = event.sequence
        if self._config.event_loss and self._random.random() < self._config.event_loss:
            return
        if self._config.staleness_s:
            self._at(self._now_s + self._config.staleness_s, partial(self._hear, instance, event))
        else:
            self._hear(instance, event)

    def _hear(self, instance: SimulatedInstance, event: CacheEvent) -> None:
        name = instance.instance_id
        if not self._index.apply(name, EPOCH, [event]) and name not in self._resyncing:
            self._resyncing.add(name)
            self._num_resyncs += 1
            self._at(self._now_s, partial(self._ask_snapshot, instance))

    def _ask_snapshot(self, instance: SimulatedInstance) -> None:
        """What the instance says now arrives after the staleness, as its events do."""
        chains = tuple(
            Stored(instance.sequence, Tier.HBM, parent, keys) for parent, keys in instance.cache.chains()
        )
        snapshot = Snapshot(instance.sequence, chains)
        self._at(self._now_s + self._config.staleness_s, partial(self._resync, instance, snapshot))

    def _resync(self, instance: SimulatedInstance, snapshot: Snapshot) -> None:
        self._resyncing.discard(instance.instance_id)
        self._index.reset(instance.instance_id, EPOCH, snapshot)


def simulate(
    trace: Trace,
    config: SimulationConfig,
    costs: CostModel = GPU_COSTS,
    arrivals: Iterable[Request] | None = None,
) -> Outcome:
    """Run `trace` through a cluster. The same arguments give the same outcome.

    `arrivals` may wrap the trace's requests to show progress. Without times, `costs` is not asked.
    """
    return Simulation(trace, config, costs).run(trace.requests if arrivals is None else arrivals)
