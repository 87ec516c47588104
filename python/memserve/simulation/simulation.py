"""Simulates a cluster over a trace, with the router's own policies, prompt tree and cost model.

    arrival -> decide -> [fetch] -> queue -> prefill -> [transfer] -> decode -> end
                 ^                              |
                 `---- tree <- events, late or lost

There are two modes. Untimed: a prompt is cached as soon as it is placed, and the load of an instance is
its uncached tokens within the window. Timed: the cost model gives the duration of each arrow.
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
from memserve.scheduling.decision import Decision, decide
from memserve.scheduling.fetch_planner import FETCH_RULES, FetchChoice
from memserve.scheduling.load_tracker import LoadTracker
from memserve.scheduling.policies import find_policy
from memserve.scheduling.prompt_tree.records import NO_OVERLAP, Overlap
from memserve.scheduling.prompt_tree.tree import GlobalPromptTree
from memserve.simulation.instance import PromptCache, SimulatedInstance, SimulatedRequest
from memserve.simulation.traces import Request, Trace

WINDOW_S = 180.0
"""How long dispatched work counts as recent."""

EXPECT_S = 60.0
"""How long a dispatched prompt counts as cached although no event has reported it."""

EPOCH = Epoch(1)
"""Simulated instances do not restart."""


@dataclass(frozen=True, slots=True)
class SimulationConfig:
    """The cluster and the router to simulate. Checked when built."""

    instances: int = 4
    """Prefill instances; colocated ones if there are no decodes."""
    decodes: int = 0
    capacity_tokens: int | None = None
    """Cache of each instance; None: unlimited."""
    policy: str = "prompt_tree"
    decode_policy: str = "prompt_tree"
    timed: bool = False
    can_fetch: bool = True
    """Only in timed mode: otherwise a transfer has no cost."""
    speed: float = 1.0
    """How many times faster than recorded the requests arrive."""
    staleness_s: float = 0.0
    """Delay of the cache events."""
    event_loss: float = 0.0
    """Share of the cache events that are lost; the next event reveals the gap."""
    cost_error: float = 1.0
    """The router's first estimate of prefill costs is this many times too high; it learns from there."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.instances < 1 or self.decodes < 0:
            raise ConfigError("there has to be at least one instance, and no negative number of decodes")
        for name in (self.policy, self.decode_policy):
            find_policy(name)
        if self.capacity_tokens is not None and self.capacity_tokens < 1:
            raise ConfigError("a cache has to have room for at least one token")
        if min(self.speed, self.cost_error) <= 0 or self.staleness_s < 0 or not 0 <= self.event_loss <= 1:
            raise ConfigError(
                "speed and cost error have to be above 0, staleness at least 0, and event loss from 0 to 1"
            )


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a simulation."""

    config: SimulationConfig
    trace: Trace
    jobs: tuple[SimulatedRequest, ...]
    """In order of arrival."""
    prefills: tuple[InstanceId, ...]
    num_resyncs: int
    learned: RlsState
    """The router's fit of prefill costs; of no observations if it began with the true costs."""


class Simulation:
    """One run. Use `simulate`."""

    def __init__(self, trace: Trace, config: SimulationConfig, costs: CostModel) -> None:
        self._trace, self._config = trace, config
        self._costs = costs if config.timed else TOKEN_COSTS
        self._learned = RlsState.of(
            PrefillCost(*(value * config.cost_error for value in astuple(self._costs.prefill)))
        )
        self._believed = with_prefill(self._costs, self._learned.cost)
        self._random = Random(config.seed)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._now_s = 0.0
        self._ended: list[SimulatedRequest] = []
        self._tree = GlobalPromptTree(clock=lambda: self._now_s)
        self._load = LoadTracker(WINDOW_S)
        self._resyncing: set[InstanceId] = set()
        self._num_resyncs = 0
        role = "prefill" if config.decodes else "worker"
        self._prefills = [self._instance(f"{role}{i}") for i in range(config.instances)]
        self._decodes = [self._instance(f"decode{i}") for i in range(config.decodes)]
        self._instances = {it.instance_id: it for it in (*self._prefills, *self._decodes)}

    def run(self, arrivals: Iterable[Request]) -> Outcome:
        """Simulate until the last request has ended; `arrivals` yields the requests of the trace."""
        for request in arrivals:
            arrival_s = request.arrival_s / self._config.speed
            self._run_until(arrival_s)
            self._now_s = arrival_s
            self._arrive(request)
        self._run_until(float("inf"))
        self._ended.sort(key=lambda job: job.request.number)
        names = tuple(it.instance_id for it in self._prefills)
        return Outcome(self._config, self._trace, tuple(self._ended), names, self._num_resyncs, self._learned)

    def _instance(self, name: str) -> SimulatedInstance:
        capacity = self._config.capacity_tokens
        block_tokens = self._trace.block_tokens
        cache = PromptCache(None if capacity is None else max(capacity // block_tokens, 1))
        instance = SimulatedInstance(InstanceId(name), self._costs, cache, block_tokens)
        self._tree.join(instance.instance_id, EPOCH)
        return instance

    def _at(self, when_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when_s, next(self._order), action))

    def _run_until(self, limit_s: float) -> None:
        while self._events and self._events[0][0] <= limit_s:
            self._now_s, _, action = heapq.heappop(self._events)
            action()

    # ---- requests

    def _arrive(self, request: Request) -> None:
        decision, overlaps = self._decide(request)
        job = SimulatedRequest(request, decision.prefill, decision.decode or decision.prefill)
        tokens = decision.context.prompt_tokens
        known = overlaps.get(decision.prefill, NO_OVERLAP).cached
        if decision.fetch:
            known = decision.fetch.num_blocks
        job.predicted_s = self._believed.exec_s(tokens, decision.context.cached_tokens(known))
        self._tree.expect(decision.prefill, request.keys, self._now_s + EXPECT_S)
        if not self._config.timed:
            self._load.add_recent(decision.prefill, job.predicted_s, self._now_s)
            self._place(job)
            return
        self._load.prefill_dispatched(decision.prefill, request.number, job.predicted_s, self._now_s)
        self._load.decode_dispatched(job.decode, request.number, tokens)
        if decision.fetch:
            self._fetch(job, decision.fetch)
        else:
            self._queue(job)

    def _decide(self, request: Request) -> tuple[Decision, dict[InstanceId, Overlap]]:
        overlaps = {  # simulated caches have one tier, which all instances can read
            name: Overlap(it.depths, it.cached) for name, it in self._tree.overlaps(request.keys).items()
        }
        prefills, decodes = (
            tuple(
                self._load.candidate(it.instance_id, overlaps.get(it.instance_id, NO_OVERLAP), self._now_s)
                for it in instances
            )
            for instances in (self._prefills, self._decodes)
        )
        config = self._config
        context = RoutingContext(
            request.prompt_tokens,
            self._trace.block_tokens,
            prefills,
            decodes,
            session=request.session,
            turn=request.number,
            seed=config.seed,
        )
        fetch_rule = FETCH_RULES["auto" if config.can_fetch and config.timed else "never"]
        return decide(context, self._believed, config.policy, config.decode_policy, fetch_rule), overlaps

    def _place(self, job: SimulatedRequest) -> None:
        """Untimed: compute and cache the prompt at once."""
        job.first_token_s = job.end_s = self._now_s
        tokens = job.request.prompt_tokens
        job.hit_blocks = self._insert(self._instances[job.prefill], job.request.keys)
        job.work_tokens = tokens - min(job.hit_blocks * self._trace.block_tokens, tokens - 1)
        self._ended.append(job)

    def _fetch(self, job: SimulatedRequest, fetch: FetchChoice) -> None:
        """Have the request wait for the blocks that its source really holds."""
        target = self._instances[job.prefill]
        there = self._instances[fetch.source].cache.depth(job.request.keys)
        here = target.cache.depth(job.request.keys)
        job.fetched_blocks = max(there - here, 0)
        num_tokens = job.fetched_blocks * self._trace.block_tokens
        duration_s = self._costs.transfer_s(num_tokens)
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
            self._learned = rls_update(
                self._learned, Observation(tokens, tokens - job.work_tokens, duration_s)
            )
            self._believed = with_prefill(self._costs, self._learned.cost)
        self._insert(instance, job.request.keys)
        self._load.prefill_done(job.prefill, job.request.number, self._now_s)
        self._begin_prefill(instance)
        if job.decode == job.prefill:
            self._handed_over(job)
            return
        there = self._instances[job.decode].cache.depth(job.request.keys) * self._trace.block_tokens
        num_tokens = max(job.request.prompt_tokens - there, 0)
        duration_s = self._costs.transfer_s(num_tokens)
        self._at(self._now_s + duration_s, partial(self._handed_over, job))

    def _handed_over(self, job: SimulatedRequest) -> None:
        """The decode instance sends the first token, and decodes the others."""
        job.first_token_s = self._now_s
        instance = self._instances[job.decode]
        if job.decode != job.prefill:
            self._insert(instance, job.request.keys)
        instance.decodes.add(job, self._now_s)
        self._schedule_end(instance)

    def _schedule_end(self, instance: SimulatedInstance) -> None:
        end_s = instance.decodes.next_end_s()
        if end_s is not None:
            self._at(end_s, partial(self._decoded, instance, instance.decodes.version))

    def _decoded(self, instance: SimulatedInstance, version: int) -> None:
        if version != instance.decodes.version:
            return
        job = instance.decodes.take_ended(self._now_s)
        job.end_s = self._now_s
        self._load.decode_done(job.decode, job.request.number)
        self._ended.append(job)
        self._schedule_end(instance)

    # ---- cache events

    def _insert(self, instance: SimulatedInstance, keys: Sequence[BlockKey]) -> int:
        """Cache a prompt and report the change; the number of its blocks that were cached before."""
        before, evicted = instance.cache.insert(keys)
        if before < len(keys):
            parent = keys[before - 1] if before else None
            self._report(instance, Stored(instance.sequence + 1, Tier.HBM, parent, tuple(keys[before:])))
        if evicted:
            self._report(instance, Removed(instance.sequence + 1, Tier.HBM, tuple(evicted)))
        return before

    def _report(self, instance: SimulatedInstance, event: CacheEvent) -> None:
        instance.sequence = event.sequence
        if self._config.event_loss and self._random.random() < self._config.event_loss:
            return
        if self._config.staleness_s:
            self._at(self._now_s + self._config.staleness_s, partial(self._apply, instance, event))
        else:
            self._apply(instance, event)

    def _apply(self, instance: SimulatedInstance, event: CacheEvent) -> None:
        name = instance.instance_id
        if not self._tree.apply(name, EPOCH, [event]) and name not in self._resyncing:
            self._resyncing.add(name)
            self._num_resyncs += 1
            self._at(self._now_s, partial(self._ask_snapshot, instance))

    def _ask_snapshot(self, instance: SimulatedInstance) -> None:
        """Request a snapshot of the instance as it is now; it arrives with the delay of events."""
        chains = tuple(
            Stored(instance.sequence, Tier.HBM, parent, keys) for parent, keys in instance.cache.chains()
        )
        snapshot = Snapshot(instance.sequence, chains)
        self._at(self._now_s + self._config.staleness_s, partial(self._resync, instance, snapshot))

    def _resync(self, instance: SimulatedInstance, snapshot: Snapshot) -> None:
        self._resyncing.discard(instance.instance_id)
        self._tree.reset(instance.instance_id, EPOCH, snapshot)


def simulate(
    trace: Trace,
    config: SimulationConfig,
    costs: CostModel = GPU_COSTS,
    arrivals: Iterable[Request] | None = None,
) -> Outcome:
    """Run `trace` through a cluster. The same arguments give the same outcome.

    `arrivals` may wrap the trace's requests to show progress. Untimed simulations ignore `costs`.
    """
    return Simulation(trace, config, costs).run(trace.requests if arrivals is None else arrivals)
