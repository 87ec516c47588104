"""Reading a pool: where the blocks of a prompt are, nearest tier first, and holds on them.

    keys    k0  k1  k2  k3  k4
    HBM     k0  k1                      each tier is prefix-closed, so that the nearest places
    DRAM    k0  k1  k2  k3              are a run in HBM, then one in DRAM

Knows no allocation. Any thread; the tiers share one lock.
"""

from __future__ import annotations

from collections.abc import Sequence

from memserve.core.block_addr import BlockAddr
from memserve.core.block_keys import BlockKey
from memserve.core.errors import BlockStateError
from memserve.mempool.index import CachedNode
from memserve.mempool.lease import Lease
from memserve.mempool.records import Match
from memserve.mempool.tier_pool import TierPool


class Leases:
    """Open leases on the blocks of `tiers`, nearest first. See MemPool for what the verbs promise."""

    def __init__(self, tiers: Sequence[TierPool]) -> None:
        self._tiers = tiers
        self._lock = tiers[0].lock
        self._open: set[Lease] = set()

    def __len__(self) -> int:
        return len(self._open)

    def match(self, keys: Sequence[BlockKey]) -> Match:
        addrs: list[BlockAddr] = []
        with self._lock:
            for tier in self._tiers:
                addrs += tier.find(keys, len(addrs))[0]
        return Match(keys[: len(addrs)], addrs, len(keys))

    def acquire(self, match: Match) -> Lease:
        addrs: list[BlockAddr] = []
        nodes: list[CachedNode | None] = []
        with self._lock:
            for tier in self._tiers:
                found, last = tier.find(match.keys, len(addrs))
                if last is not None:
                    tier.cache.index.pin(last)
                addrs += found
                nodes.append(last)
                tier.hits += len(found)
                tier.misses += match.num_wanted - len(addrs)
            lease = Lease(match.keys[: len(addrs)], addrs, nodes, self.release)
            self._open.add(lease)
        return lease

    def release(self, lease: Lease) -> None:
        with self._lock:
            if lease not in self._open:
                raise BlockStateError("a lease that has ended, or is another pool's")
            self._open.remove(lease)
            for tier, node in zip(self._tiers, lease.nodes, strict=True):
                if node is not None:
                    tier.cache.unpin(node)

    def verify(self, lease: Lease) -> int:
        good = 0
        for tier, keys, addrs in self._runs(lease):
            held = tier.verify(keys, addrs)
            good += held
            if held < len(keys):
                break
        return good

    def checksums(self, lease: Lease) -> list[int]:
        return [one for tier, _, addrs in self._runs(lease) for one in tier.checksums(addrs)]

    def _runs(self, lease: Lease) -> list[tuple[TierPool, Sequence[BlockKey], Sequence[BlockAddr]]]:
        """The lease's blocks, tier by tier."""
        runs, start = [], 0
        for tier in self._tiers:
            end = start
            while end < len(lease) and tier.holds(lease.addrs[end]):
                end += 1
            runs.append((tier, lease.keys[start:end], lease.addrs[start:end]))
            start = end
        return runs
