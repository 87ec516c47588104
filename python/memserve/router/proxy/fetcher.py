"""Fetch before dispatch: the chosen prefill gets blocks from a better holder before it gets the request.

    links   the pools of both instances that hold equal blocks, rank by rank
    run     `Fetch` to each rank's pool ── the fewest blocks that a rank has now ──> Fetched
    wait    until another request's fetch has brought blocks to the same prefill

The plan bounds the time by what the fetch can save. A fetch that fails or is late costs recomputation.
Source: MemServe, Eq. 2.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from memserve.core.cluster_key import ClusterKey
from memserve.core.errors import MemServeError
from memserve.core.ids import InstanceId
from memserve.router.cluster.pools import Pools
from memserve.scheduling.fetch_planner import FetchOutcome, FetchPlan
from memserve.wire.async_link import AsyncControlClient
from memserve.wire.messages import PoolInfo
from memserve.wire.peer_messages import Fetch as FetchMessage
from memserve.wire.peer_messages import Fetched

logger = logging.getLogger(__name__)


Links = tuple[tuple[PoolInfo, PoolInfo], ...]
"""For each rank, the pool that fetches and the pool that it fetches from."""


def links_between(pools: Pools, target: InstanceId, source: InstanceId) -> Links:
    """Each pool of `target` with a pool of `source` that has equal blocks; empty if one finds none.

    A pool without a layout, a memory instance's, holds blocks of any layout.
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

    async def run(self, plan: FetchPlan, links: Links) -> FetchOutcome:
        """Fetch on every rank. Failures of pools are outcomes, not errors.

        If the caller is cancelled, the fetch goes on for the requests that wait for it.
        """
        task = asyncio.create_task(self._run(plan, links))
        self._under_way[task] = plan
        task.add_done_callback(self._under_way.pop)
        return await asyncio.shield(task)

    async def wait(self, is_needed: Callable[[FetchPlan], bool]) -> float | None:
        """Wait until the needed fetches under way have ended; the seconds, None if there are none."""
        tasks = [task for task, plan in self._under_way.items() if is_needed(plan)]
        if not tasks:
            return None
        begun_s = self._clock()
        await asyncio.wait(tasks)
        return self._clock() - begun_s

    async def _run(self, plan: FetchPlan, links: Links) -> FetchOutcome:
        begun_s = self._clock()
        answers = await asyncio.gather(*(self._ask(plan, own, other) for own, other in links))
        least = min(answers, key=lambda answer: answer.num_blocks)
        if least.reason:
            logger.info(
                "fetched less target=%s source=%s blocks=%d of %d: %s",
                *(plan.target, plan.source, least.num_blocks, len(plan.keys), least.reason),
            )
        return FetchOutcome(least.num_blocks, self._clock() - begun_s, least.reason)

    def retain(self, pools: Pools) -> None:
        """Close the connections to pools that have left."""
        self._client.keep({info.address for info in pools.infos()})

    def close(self) -> None:
        """Release the sockets and cancel the fetches under way."""
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
            timeout_s = plan.timeout_s + 0.05  # The answer may come a little after the end of the fetch.
            answer = await self._client.request(own.address, wanted, timeout_s=timeout_s)
        except MemServeError as error:
            return Fetched(0, str(error))
        return answer if isinstance(answer, Fetched) else Fetched(0, f"{own.address} does not fetch")
