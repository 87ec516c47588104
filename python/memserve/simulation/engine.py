"""A simulated instance's two engines: a queue of prefills, and a batch that decodes.

Prefills run one after another in order of arrival, as batching them saves nothing once the compute
is full. Decodes run together, a step for all; between two changes of the batch its steps take equal
time. Both engines of a colocated instance run as if alone. Knows no router and no policy.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass

from memserve.core.ids import InstanceId
from memserve.scheduling.cost_model.model import CostModel
from memserve.simulation.cache import PromptCache
from memserve.simulation.traces import Request


@dataclass(slots=True)
class SimulatedRequest:
    """A request on its way. Times in seconds of the simulation."""

    request: Request
    prefill: InstanceId
    decode: InstanceId
    predicted_s: float = 0.0
    fetched_blocks: int = 0
    hit_blocks: int = 0
    """Blocks found cached when the prefill began, fetched ones among them."""
    work_tokens: int = 0
    """Tokens that were computed."""
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
        """Take up the next prefill, if idle: the job and how long it takes. `end` has to follow."""
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
    """Requests that decode together. Progress is counted in steps, so that a change costs O(log n)."""

    def __init__(self, costs: CostModel) -> None:
        self._costs = costs
        self._ends: list[tuple[float, int, SimulatedRequest]] = []
        """By the step after which each has all its tokens."""
        self._context_tokens = 0.0
        self._steps = 0.0
        self._now_s = 0.0
        self.version = 0
        """Goes up whenever the batch changes, so that an end foretold before is known to be void."""

    def add(self, job: SimulatedRequest, now_s: float) -> None:
        """Its first token has come from the prefill; the others take a step each."""
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
    """One server: its cache and its engines, and the number of the last event it told."""

    def __init__(
        self, instance_id: InstanceId, costs: CostModel, cache: PromptCache, block_tokens: int
    ) -> None:
        self.instance_id = instance_id
        self.cache = cache
        self.prefills = PrefillQueue(costs, cache, block_tokens)
        self.decodes = DecodeBatch(costs)
        self.sequence = 0
