"""A simulated instance: its cache, its queue of prefills and its decode batch.

Prefills run one after another in order of arrival: batching saves nothing once the compute is full.
Decodes run together, one step for all; the steps between two changes of the batch take equal time.
Prefills and decodes of a colocated instance do not slow each other. Knows no router, policy or tier.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from memserve.core.block_keys import BlockKey
from memserve.core.ids import InstanceId
from memserve.scheduling.cost_model.model import CostModel
from memserve.simulation.traces import Request


class PromptCache:
    """The blocks cached at one instance: prefix-closed, evicted leaf-first in LRU order.

    Every use touches a prompt's blocks from its last to its first, so a block is always older than its
    parent: the oldest of all is a leaf, and a plain LRU list evicts leaf-first.
    """

    def __init__(self, capacity_blocks: int | None) -> None:
        """`capacity_blocks` None: unlimited."""
        self._capacity = capacity_blocks
        self._blocks: OrderedDict[BlockKey, BlockKey | None] = OrderedDict()
        """Parents by key, the least recently used block first."""

    def __len__(self) -> int:
        return len(self._blocks)

    def depth(self, keys: Sequence[BlockKey]) -> int:
        """Number of `keys`, from the front, that are cached. Not a use."""
        blocks = self._blocks
        for depth, key in enumerate(keys):
            if key not in blocks:
                return depth
        return len(keys)

    def insert(self, keys: Sequence[BlockKey]) -> tuple[int, list[BlockKey]]:
        """Cache a whole prompt and make it the most recently used.

        Returns the number of its blocks that were cached before, and the blocks evicted for the others,
        children before their parents. Of a prompt that is larger than the cache, the first blocks stay.
        """
        blocks, before = self._blocks, self.depth(keys)
        for i in range(len(keys) - 1, -1, -1):
            if i < before:
                blocks.move_to_end(keys[i])
            else:
                blocks[keys[i]] = keys[i - 1] if i else None
        evicted: list[BlockKey] = []
        if self._capacity is not None:
            while len(blocks) > self._capacity:
                evicted.append(blocks.popitem(last=False)[0])
        return before, evicted

    def chains(self) -> list[tuple[BlockKey | None, tuple[BlockKey, ...]]]:
        """The content of a snapshot: (parent, blocks) of all cached blocks, parents first."""
        return [(self._blocks[key], (key,)) for key in reversed(self._blocks)]


@dataclass(slots=True)
class SimulatedRequest:
    """A request and its progress. Times are seconds of the simulation."""

    request: Request
    prefill: InstanceId
    decode: InstanceId
    predicted_s: float = 0.0
    fetched_blocks: int = 0
    hit_blocks: int = 0
    """Blocks cached when the prefill began, including fetched ones."""
    work_tokens: int = 0
    """Tokens that the prefill computed."""
    first_token_s: float = 0.0
    end_s: float = 0.0


class PrefillQueue:
    """First come, first served."""

    def __init__(self, costs: CostModel, cache: PromptCache, block_tokens: int) -> None:
        self._costs, self._cache, self._block_tokens = costs, cache, block_tokens
        self._waiting: deque[SimulatedRequest] = deque()
        self._busy = False

    def add(self, job: SimulatedRequest) -> None:
        self._waiting.append(job)

    def begin(self) -> tuple[SimulatedRequest, float] | None:
        """Begin the next prefill, if idle: the job and its seconds. `end` has to follow."""
        if self._busy or not self._waiting:
            return None
        self._busy = True
        job = self._waiting.popleft()
        job.hit_blocks = self._cache.depth(job.request.keys)
        tokens = job.request.prompt_tokens
        cached = min(job.hit_blocks * self._block_tokens, tokens - 1)
        job.work_tokens = tokens - cached
        return job, self._costs.exec_s(tokens, cached)

    def end(self) -> None:
        self._busy = False


class DecodeBatch:
    """Requests that decode together. It counts progress in steps, so that a change costs O(log n)."""

    def __init__(self, costs: CostModel) -> None:
        self._costs = costs
        self._ends: list[tuple[float, int, SimulatedRequest]] = []
        """Requests by the step after which they have all their tokens."""
        self._context_tokens = 0.0
        self._steps = 0.0
        self._now_s = 0.0
        self.version = 0
        """Increases with every change of the batch, which voids ends that were scheduled before."""

    def add(self, job: SimulatedRequest, now_s: float) -> None:
        """Add a request whose prefill gave its first token; each other token takes a step."""
        self._advance(now_s)
        remaining = max(job.request.output_tokens - 1, 0)
        heapq.heappush(self._ends, (self._steps + remaining, job.request.number, job))
        self._context_tokens += job.request.prompt_tokens
        self.version += 1

    def next_end_s(self) -> float | None:
        """When the next request ends if nothing changes; None in an empty batch."""
        if not self._ends:
            return None
        return self._now_s + max(self._ends[0][0] - self._steps, 0.0) * self._step_s()

    def take_ended(self, now_s: float) -> SimulatedRequest:
        """The request that ends now, taken out of the batch."""
        self._advance(now_s)
        end, _, job = heapq.heappop(self._ends)
        self._steps = max(self._steps, end)
        self._context_tokens -= job.request.prompt_tokens + max(job.request.output_tokens - 1, 0)
        if not self._ends:
            self._context_tokens = 0.0
        self.version += 1
        return job

    def _step_s(self) -> float:
        return self._costs.step_s(len(self._ends), max(int(self._context_tokens), 0))

    def _advance(self, now_s: float) -> None:
        if self._ends:
            steps = (now_s - self._now_s) / self._step_s()
            self._steps += steps
            self._context_tokens += steps * len(self._ends)
        self._now_s = now_s


class SimulatedInstance:
    """One server. `sequence` is the number of the last cache event that it reported."""

    def __init__(
        self, instance_id: InstanceId, costs: CostModel, cache: PromptCache, block_tokens: int
    ) -> None:
        self.instance_id = instance_id
        self.cache = cache
        self.prefills = PrefillQueue(costs, cache, block_tokens)
        self.decodes = DecodeBatch(costs)
        self.sequence = 0
