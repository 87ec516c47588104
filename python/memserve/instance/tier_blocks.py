"""What heartbeats tell of an instance's pools."""

from __future__ import annotations

from collections.abc import Sequence

from memserve.mempool.pool import MemPool
from memserve.wire.messages import TierBlocks


def tier_blocks(pools: Sequence[MemPool]) -> tuple[TierBlocks, ...]:
    """What is in each tier of some pools of one instance."""
    stats = [pool.stats() for pool in pools]
    dram = TierBlocks(
        "dram",
        sum(one.cached for one in stats),
        sum(one.free for one in stats),
        sum(one.total for one in stats),
    )
    followed = [item for pool in pools for item in pool.external_blocks().items()]
    return (dram, *(TierBlocks(tier.name.lower(), num_blocks) for tier, num_blocks in followed))
