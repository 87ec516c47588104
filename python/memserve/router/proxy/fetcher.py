"""Fetch before dispatch: the chosen prefill is told to get blocks from a better holder, and waited for.

    plan   the pools of both instances that hold equal blocks, rank by rank
    run    `Fetch` to each rank's pool ── the least of what they have now ──> Fetched
    wait   for what another request's plan brings to the same prefill

Bounded by what it can save. A fetch that fails, or is late, costs recomputation and nothing else.
Source: MemServe, Eq. 2.
"""

from __future__ import annotations

import asyncio
import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from memserve.core.block_keys import BlockKey
from memserve.core.cluster_key import ClusterKey
from memserve.core.errors import MemServeError
from memserve.core.ids import InstanceId
from memserve.router.cluster.pools import Pools
from memserve.wire.async_link import AsyncControlClient
from memserve.wire.messages import PoolInfo
from memserve.wire.peer_messages import Fetch as FetchMessage
from memserve.wire.peer_messages import Fetched

logger = logging.getLogger(__name__)

MAX_FETCH_S = 2.0
"""However much a fetch could save: who holds the blocks may be gone."""
ANSWER_S = 0.05
"""How much later than the fetch has to end its answer may come."""


@dataclass(frozen=True, slots=True)
class FetchPlan:
    """What to move before a request goes out."""

    target: InstanceId
    source: InstanceId
    keys: Sequence[BlockKey]
    """From the prompt's first block on."""
    links: tuple[tuple[PoolInfo, PoolInfo], ...]
    """Of each rank: who fetches, and from whom."""
    num_there: int
    """How many of the keys, from the first, the target has."""
    transfer_s: float
    """Predicted for the others."""
    timeout_s: float

    def num_shared(self, chain: Sequence[BlockKey]) -> int:
        """How many of the keys, from the first, are a prompt's, too. O(log n): a key names all before it."""
        shorter = range(min(len(self.keys), len(chain)))
        return bisect_left(shorter, True, key=lambda place: self.keys[place] != chain[place])


@dataclass(frozen=True, slots=True)
class FetchOutcome:
    """What came of a plan."""

    num_blocks: int
    """Of the chain that the target has now, from the first, on every rank."""
    seconds: float
    reason: str
    """Why it is not all of them; "" if it is."""


def links_between(
    pools: Pools, target: InstanceId, source: InstanceId
) -> tuple[tuple[PoolInfo, PoolInfo], ...]:
    """Each pool of `target` and that of `source` with equal blocks; none if one lacks its like.

    A pool without a layout, a memory instance's, takes blocks of any.
    """
    links = []
    for own in pools.of(target):
        other = next((one for one in pools.of(source) if one.layout in (own.layout, "")), None)
        if other is None:
            return ()
        links.append((own, other))
    return tuple(links)


class Fetcher:
    """Runs plans. Event loop thread only."""

    def __init__(self, key: ClusterKey | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._client = AsyncControlClient(key=key)
        self._clock = clock
        self._under_way: dict[asyncio.Task[FetchOutcome], FetchPlan] = {}

    async def run(self, plan: FetchPlan) -> FetchOutcome:
        """Never raises for what a pool did or did not do. Goes on for who waits if it is cancelled."""
        task = asyncio.create_task(self._run(plan))
        self._under_way[task] = plan
        task.add_done_callback(self._under_way.pop)
        return await asyncio.shield(task)

    async def wait(self, is_needed: Callable[[FetchPlan], bool]) -> float | None:
        """Until the plans under way that are needed have run; the seconds, None if there were none."""
        tasks = [task for task, plan in self._under_way.items() if is_needed(plan)]
        if not tasks:
            return None
        begun_s = self._clock()
        await asyncio.wait(tasks)
        return self._clock() - begun_s

    async def _run(self, plan: FetchPlan) -> FetchOutcome:
        begun_s = self._clock()
        answers = await asyncio.gather(*(self._ask(plan, own, other) for own, other in plan.links))
        least = min(answers, key=lambda answer: answer.num_blocks)
        if least.reason:
            logger.info(
                "fetched less target=%s source=%s blocks=%d of %d: %s",
                *(plan.target, plan.source, least.num_blocks, len(plan.keys), least.reason),
            )
        return FetchOutcome(least.num_blocks, self._clock() - begun_s, least.reason)

    def keep(self, pools: Pools) -> None:
        """Close the connections to pools that are not there any more."""
        self._client.keep({info.address for info in pools.infos()})

    def close(self) -> None:
        """Release the sockets; whoever waits gets nothing."""
        for task in self._under_way:
            task.cancel()
        self._client.close()

    async def _ask(self, plan: FetchPlan, own: PoolInfo, other: PoolInfo) -> Fetched:
        wanted = FetchMessage(
            layout=bytes.fromhex(own.layout),
            keys=tuple(plan.keys),
            parent=None,
            holder=other.address,
            holder_epoch=other.epoch,
            timeout_s=plan.timeout_s,
        )
        try:
            answer = await self._client.request(own.address, wanted, timeout_s=plan.timeout_s + ANSWER_S)
        except MemServeError as error:
            return Fetched(0, str(error))
        return answer if isinstance(answer, Fetched) else Fetched(0, f"{own.address} does not fetch")
