"""The tiers of an instance's pools, as heartbeats report them."""

from __future__ import annotations

from collections.abc import Sequence

from memserve.core.block_addr import Tier
from memserve.mempool.pool import MemPool
from memserve.wire.messages import TierBlocks


def tier_blocks(pools: Sequence[MemPool]) -> tuple[TierBlocks, ...]:
    """Blocks in each tier of some pools of one instance: their own tiers, then the external ones."""
    numbers = {Tier.DRAM: [0, 0, 0]}
    for pool in pools:
        for tier, stats in pool.stats_by_tier().items():
            before = numbers.get(tier, [0, 0, 0])
            numbers[tier] = [
                a + b for a, b in zip(before, (stats.cached, stats.free, stats.total), strict=True)
            ]
    own = [TierBlocks(tier.name.lower(), *numbers[tier]) for tier in sorted(numbers)]
    external = [item for pool in pools for item in pool.external_blocks().items()]
    return (*own, *(TierBlocks(tier.name.lower(), num_blocks) for tier, num_blocks in external))
