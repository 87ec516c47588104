"""Reading a pool: where the blocks of a prompt are, nearest tier first, and leases on them.

    keys        k0  k1  k2  k3  k4
    near tier   k0  k1                      each tier is prefix-closed, so that the nearest places
    far tier    k0  k1  k2  k3              are a run in the near tier, then one in the far tier

Knows no allocation. Any thread; the tiers share one lock.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

from memserve.core.block_addr import BlockAddr, Tier
from memserve.core.block_keys import BlockKey
from memserve.core.errors import BlockStateError
from memserve.mempool.index import CachedNode
from memserve.mempool.records import Match
from memserve.mempool.tier_pool import TierPool


class Lease:
    """Cached blocks that keep their place until `MemPool.release`: a context manager, left once."""

    def __init__(
        self,
        keys: Sequence[BlockKey],
        addrs: Sequence[BlockAddr],
        nodes: Sequence[CachedNode | None],
        release: Callable[[Lease], None],
    ) -> None:
        self.keys = keys
        """The leased blocks: the prefix of the match that was still cached."""
        self.addrs = addrs
        """addrs[i] holds keys[i]."""
        self.nodes = nodes
        """For the pool: the last leased block in each tier, None if there is none."""
        self._release = release

    def __len__(self) -> int:
        return len(self.keys)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release(self)


class Leases:
    """Open leases on the blocks of `tiers`, nearest first. See MemPool for the contracts."""

    def __init__(self, tiers: Mapping[Tier, TierPool]) -> None:
        self._tiers = tuple(tiers.values())
        self._lock = self._tiers[0].lock
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
