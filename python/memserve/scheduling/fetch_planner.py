"""From a fetch that pays to what has to be asked of whom: who holds how much where others can read it."""

from __future__ import annotations

from memserve.core.block_addr import Tier
from memserve.core.ids import InstanceId, pool_name
from memserve.router.cluster.pools import Pools
from memserve.router.kv_events.synchronizer import TreeSynchronizer
from memserve.router.observability.metrics import RouterMetrics
from memserve.router.proxy.fetcher import MAX_FETCH_S, FetchPlan, links_between
from memserve.router.tokenization.prompts import Prompt
from memserve.scheduling.decision import Decision
from memserve.wire.messages import Role


class FetchPlanner:
    """Plans fetches. Event loop thread only."""

    def __init__(self, feed: TreeSynchronizer, pools: Pools, metrics: RouterMetrics) -> None:
        self._feed = feed
        self._pools = pools
        self._metrics = metrics

    def plan(self, decision: Decision, prompt: Prompt) -> FetchPlan | None:
        """The decision's fetch; None if there is none, or no way between the two."""
        fetch = decision.fetch
        if fetch is None:
            return None
        links = links_between(self._pools, decision.prefill, fetch.source)
        if not links:
            self._metrics.fetches.labels("impossible").inc()
            return None
        return FetchPlan(
            target=decision.prefill,
            source=fetch.source,
            keys=prompt.chains[0][: fetch.num_blocks],
            links=links,
            num_there=decision.chosen.total_blocks,
            transfer_s=fetch.transfer_s,
            timeout_s=min(fetch.saved_s + decision.chosen.queued_s, MAX_FETCH_S),
        )

    def offers_less(self, decision: Decision, prompt: Prompt) -> int | None:
        """How many blocks the holder has in DRAM, where others can read them; None if that is all it has."""
        assert decision.fetch is not None
        names = self.names_of(decision.fetch.source, decision.prefill)
        tree, chain = self._feed.tree, prompt.chains[0]
        offered = max((tree.depth_in(name, Tier.DRAM, chain) for name in names), default=0)
        return None if offered >= decision.fetch.num_blocks else offered

    def names_of(self, holder: InstanceId, target: InstanceId) -> list[InstanceId]:
        """What a holder's pools are called in the tree; of a memory instance's, those like the target's."""
        layouts = {pool.layout for pool in self._pools.of(target) if pool.rank == 0}
        names = []
        for pool in self._pools.of(holder):
            if pool.role is Role.MEMORY:
                names += [pool_name(holder, layout) for layout in layouts]
            else:
                names.append(pool.instance_id)
        return names
