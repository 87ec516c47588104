"""The load that one router carries: its real scheduler, prompt tree and synchronizer, without HTTP.

A quarter of the instances decode. Of the tree's blocks, each instance reports a like share, in chains
of 256 (4,096 tokens) that begin with a system prompt of 32 that all have. A decision is everything the
router does with a request beside HTTP and tokenizing: the choice, its load, the blocks expected in the
tree, and the same at its first token and its end; half of the prompts continue a known chain.

The largest cluster is where one core is busy for `BUSY` of the time, at so many requests per second for
each instance: a decision (a + b x instances, fitted to those measured), `--http` (what bench_router
measures for a request through a pair) and the events that a request leads to.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np

from figures import progress, report
from memserve.core.block_addr import Tier
from memserve.core.block_keys import BlockKey
from memserve.core.cache_events import CacheEvent, Removed, Stored
from memserve.core.caching import CachingMode
from memserve.core.ids import Epoch, InstanceId
from memserve.router.cluster.config import ClusterConfig
from memserve.router.cluster.instance import ClusterSnapshot, Instance
from memserve.router.cluster.pools import Pools
from memserve.router.kv_events.synchronizer import TreeSynchronizer
from memserve.router.observability.metrics import RouterMetrics
from memserve.router.proxy.placement import GlobalScheduler
from memserve.router.server_info import ServerInfo
from memserve.scheduling.context import Prompt
from memserve.scheduling.cost_model.model import GPU_COSTS
from memserve.scheduling.prompt_tree.tree import BYTES_PER_BLOCK, GlobalPromptTree
from memserve.scheduling.selector import SelectorConfig
from memserve.wire.messages import Done, PoolEvents, PoolInfo, Role

PAGE, BLOCKS, SYSTEM, NUM_SYSTEMS = 16, 256, 32, 16
NUM_DECISIONS = 400
BUSY = 0.8
HTTP_US = 560.0
"""bench_router on two cores: processor time of a plain 4 KB request through a pair, text keys; its own
decision among four workers is in it."""
EVENT_BLOCKS = 4 * (BLOCKS - SYSTEM)
"""Of a request with a new conversation: stored and removed again, in HBM and in DRAM."""
RATES = (0.1, 1.0, 10.0)
"""Requests per second for each instance."""
BUDGETS_GIB = (1, 16)
CACHE_TOKENS = 3_000_000
"""What an instance holds, HBM and DRAM."""


@dataclass(frozen=True, slots=True)
class Carried:
    """One size of cluster, measured."""

    instances: int
    blocks: int
    decisions_us: list[float]
    events_per_s: list[float]
    """Blocks."""
    tree_mib: float


def run(instances: Sequence[int], *, quick: bool) -> None:
    """All figures."""
    sizes = [(count, blocks) for blocks in (200_000, 1_000_000) for count in sorted(instances)]
    if quick:
        sizes = [(count, 200_000) for count in sorted(instances)]
    seen = []
    for count, blocks in sizes:
        progress(f"one router: {count} instances, {blocks} blocks")
        with ProcessPoolExecutor(1) as alone:  # a process of its own: its memory is the tree's
            seen.append(alone.submit(measure, count, blocks).result())
        show(seen[-1])
    show_largest([it for it in seen if it.blocks == sizes[-1][1]])


def show(seen: Carried) -> None:
    name = f"scale/router/{seen.instances}_instances/{seen.blocks}_blocks"
    ordered = sorted(seen.decisions_us)
    report(f"{name}/decision", seen.decisions_us, "us")
    report(f"{name}/decision_p99", [ordered[int(0.99 * len(ordered))]], "us")
    report(f"{name}/decisions", [1e6 / statistics.mean(seen.decisions_us)], "decisions/s of one core")
    report(f"{name}/events", seen.events_per_s, "blocks/s")
    promised_mib = seen.blocks * BYTES_PER_BLOCK / 2**20
    report(f"{name}/tree_memory", [seen.tree_mib], "MiB", baseline=[promised_mib], target=1.0)


def show_largest(seen: Sequence[Carried]) -> None:
    """Where it breaks, by rate for the processor and by budget for memory."""
    counts = np.array([it.instances for it in seen], float)
    mean_us = np.array([statistics.mean(it.decisions_us) for it in seen])
    events_us = 1e6 * EVENT_BLOCKS / min(statistics.median(it.events_per_s) for it in seen)
    line = np.polyfit(counts, mean_us, 1) if len(seen) > 1 else (0.0, mean_us[0])
    each_us, fixed_us = (max(float(it), 0.0) for it in line)
    report("scale/router/decision_fixed", [fixed_us], "us")
    report("scale/router/decision_each_instance", [each_us], "us")
    report("scale/router/events_of_a_request", [events_us], "us")
    for rate in RATES:
        largest = largest_cluster(rate, fixed_us + HTTP_US + events_us, each_us)
        report(f"scale/router/largest_cluster/{rate:g}_requests_per_s", [largest], "instances")
    for gib in BUDGETS_GIB:
        room = gib * 2**30 // BYTES_PER_BLOCK
        report(f"scale/router/largest_cluster/{gib}_gib_tree", [room // (CACHE_TOKENS // PAGE)], "instances")


def largest_cluster(rate: float, request_us: float, each_us: float) -> int:
    """The most instances n for which n x rate x (request + each x n) is `BUSY` of a core."""
    budget_us = BUSY * 1e6 / rate
    if each_us == 0:
        return int(budget_us / request_us)
    return int((math.sqrt(request_us**2 + 4 * each_us * budget_us) - request_us) / (2 * each_us))


def measure(num_instances: int, num_blocks: int) -> Carried:
    """In processor time of this process."""
    before = resident_bytes()
    stage = Stage(num_instances)
    stage.fill(num_blocks)
    gc.collect()
    tree_mib = (resident_bytes() - before) / 2**20
    gc.freeze()
    return Carried(num_instances, num_blocks, stage.decisions_us(), stage.event_rates(), tree_mib)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class _NoObserver:
    """Every instance reports its cache."""

    def record_prompt(self, keys: Sequence[BlockKey]) -> None:
        pass

    def record_answer(self, instance: InstanceId, keys: Sequence[BlockKey]) -> None:
        pass

    def is_approximate(self, instance: InstanceId) -> bool:
        return False


class Stage:
    """A router's scheduler with so many instances registered."""

    def __init__(self, num_instances: int) -> None:
        self._random = Random(0)
        self._pools = Pools(ClusterConfig(heartbeat_secs=3600), time.monotonic)
        self._feed = TreeSynchronizer(GlobalPromptTree(), self._pools, audit_s=1e9)
        settings = SelectorConfig("prompt_tree", "prompt_tree", GPU_COSTS, 0.0, "auto")
        metrics = RouterMetrics()
        self._scheduler = GlobalScheduler(
            settings, self._feed, self._pools, _NoObserver(), metrics, time.monotonic
        )
        facts = ServerInfo("model", "/model", page_size=PAGE)
        self._epochs = [Epoch(number + 1) for number in range(num_instances)]
        self._sequences = dict.fromkeys(self._epochs, 0)
        members = []
        for epoch in self._epochs:
            role = Role.DECODE if epoch % 4 == 0 else Role.PREFILL
            name = InstanceId(f"{role}-{epoch}")
            members.append(Instance(name, epoch, role, f"http://10.0.0.1:{epoch}", 8998, facts))
            address = f"10.0.0.1:{20_000 + epoch}"
            info = PoolInfo(name, epoch, role, CachingMode.FULL, address, "aa", "", PAGE << 17, 0)
            self._pools.register(info)
        self._snapshot = ClusterSnapshot.of(members)
        self._systems = [self._keys(SYSTEM) for _ in range(NUM_SYSTEMS)]
        self._known: list[list[BlockKey]] = []

    def fill(self, num_blocks: int) -> None:
        """Every instance in turn gets a chain, until the tree has so many blocks."""
        for number in range(num_blocks // (BLOCKS - SYSTEM)):
            keys = self._conversation()
            self._tell(self._epochs[number % len(self._epochs)], self._stored(keys))
            if len(self._known) < NUM_DECISIONS:
                self._known.append(keys)

    def decisions_us(self) -> list[float]:
        """Of each request all that the router does beside HTTP; some are on their way meanwhile."""
        taken, running = [], []
        for number in range(NUM_DECISIONS + 50):
            keys = self._conversation()
            if number % 2:
                keys = [*self._random.choice(self._known)[: BLOCKS - 16], *keys[-16:]]
            prompt = Prompt(len(keys) * PAGE + 5, (tuple(keys),))
            begun = time.process_time()
            placed = self._scheduler.place(self._snapshot, prompt)
            assert placed is not None
            running.append(placed)
            if len(running) > 16:
                oldest = running.pop(0)
                self._scheduler.prefilled(oldest, 0)
                self._scheduler.ended(oldest, is_answered=True)
            if number >= 50:
                taken.append((time.process_time() - begun) * 1e6)
        return taken

    def event_rates(self) -> list[float]:
        """Blocks per second, new ones and the same gone again, from all instances in turn."""
        rates = []
        for _ in range(7):
            chains = [(self._random.choice(self._epochs), self._conversation()) for _ in range(100)]
            begun = time.process_time()
            for epoch, keys in chains:
                self._tell(epoch, self._stored(keys))
            for epoch, keys in chains:
                self._tell(epoch, self._removed(keys))
            blocks = len(chains) * (2 * BLOCKS - SYSTEM)
            rates.append(blocks / (time.process_time() - begun))
        return rates

    def _tell(self, epoch: Epoch, change: Callable[[int], CacheEvent]) -> None:
        self._sequences[epoch] += 1
        answer = self._feed.events(PoolEvents(epoch, (change(self._sequences[epoch]),), ""))
        assert isinstance(answer, Done), answer

    def _stored(self, keys: list[BlockKey]) -> Callable[[int], CacheEvent]:
        return lambda at: Stored(at, Tier.DRAM, None, tuple(keys))

    def _removed(self, keys: list[BlockKey]) -> Callable[[int], CacheEvent]:
        return lambda at: Removed(at, Tier.DRAM, tuple(reversed(keys[SYSTEM:])))

    def _conversation(self) -> list[BlockKey]:
        """A new chain after one of the system prompts."""
        return [*self._random.choice(self._systems), *self._keys(BLOCKS - SYSTEM)]

    def _keys(self, count: int) -> list[BlockKey]:
        return [BlockKey(self._random.randbytes(32)) for _ in range(count)]
