"""One budget of DRAM for blocks of any layout: a pool for each layout that peers use.

    first layout: all of it     second: half each     n-th: an n-th each, the others shrink

A pool shrinks by evicting; blocks that are read or written at that moment go later. An unused layout
keeps one block, so that its pool can be found and grow again.
Knows no peers and no router.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterable

from memserve.core.errors import ConfigError, MemServeError, OutOfBlocks
from memserve.core.ids import Epoch
from memserve.core.kv_layout import KVLayout
from memserve.mempool.arena import Arena
from memserve.mempool.eviction import EvictionPolicy, lru
from memserve.mempool.pool import MemPool

logger = logging.getLogger(__name__)

_ALIGNMENT = 64
"""Of an arena's slots."""


class MemoryBudget:
    """The pools of one process. Any thread; pools are made and resized one at a time."""

    def __init__(
        self,
        budget_bytes: int,
        epoch: Epoch,
        *,
        on_resized: Callable[[MemPool], None],
        eviction: EvictionPolicy = lru,
        max_layouts: int = 64,
        step_bytes: int = 1 << 28,
        max_step_bytes: int = 1 << 32,
    ) -> None:
        """`epoch` is the process's; nothing is taken yet.

        `step_bytes`: first size of a new pool at most: allocating takes time, and a peer waits for it.
        `max_step_bytes`: a pool grows by at most this in one step.

        `on_resized` is told of each pool whose arena has another size. It may raise a MemServeError,
        which is logged.
        """
        self.budget_bytes = budget_bytes
        self._epoch = epoch
        self._on_resized = on_resized
        self._eviction = eviction
        self._max_layouts = max_layouts
        self._step_bytes = step_bytes
        self._max_step_bytes = max_step_bytes
        self._changing = threading.Lock()
        self._pools: dict[bytes, MemPool] = {}
        self._unused: frozenset[bytes] = frozenset()

    def pools(self) -> tuple[MemPool, ...]:
        """All pools, the oldest first."""
        return tuple(self._pools.values())

    def pool_of(self, layout: KVLayout) -> MemPool:
        """The pool for blocks of `layout`, made if there is none.

        A new one gets its share of the budget or its first part of it (see `balance`); the others
        have shrunk to theirs. Raises ConfigError for one layout too many or blocks larger than a share,
        OutOfBlocks if the others cannot shrink now; then the shares are what they were.
        """
        known = self._pools.get(layout.digest)
        if known is not None:
            return known
        with self._changing:
            if layout.digest in self._pools:
                return self._pools[layout.digest]
            share = self._share(1)
            self._check(layout, share)
            for pool in self._pools.values():
                self._resize(pool, min(pool.arena.num_slots, self._num_slots(pool, share)))
            self._pools[layout.digest] = pool = self._made(layout, share)
        logger.info(
            "memory lent layout=%s blocks=%d layouts=%d",
            layout.digest.hex()[:12],
            pool.arena.num_slots,
            len(self._pools),
        )
        return pool

    def balance(self, unused: Collection[bytes] = ()) -> bool:
        """Bring each pool one step nearer to its share; returns whether a size has changed.

        `unused`: digests of layouts that get no share, from now until another call says otherwise.
        """
        with self._changing:
            self._unused = frozenset(unused)
            share = self._share(0)
            changed = [self._step(pool, share) for pool in self._pools.values()]
        return any(changed)

    def close(self) -> None:
        """Release all memory; the pools must not be used any more."""
        with self._changing:
            for pool in self._pools.values():
                pool.arena.close()
            self._pools.clear()

    def _share(self, num_more: int) -> int:
        """Bytes for each used layout, with `num_more` layouts counted in."""
        return self.budget_bytes // max(len(self._pools.keys() - self._unused) + num_more, 1)

    def _num_slots(self, pool: MemPool, share: int) -> int:
        return 1 if pool.layout.digest in self._unused else share // pool.arena.slot_bytes

    def _used_bytes(self) -> int:
        return sum(pool.arena.slot_bytes * pool.arena.num_slots for pool in self._pools.values())

    def _check(self, layout: KVLayout, share: int) -> None:
        if len(self._pools) >= self._max_layouts:
            raise ConfigError(
                f"this memory is lent to {self._max_layouts} layouts already, and takes no other"
            )
        largest = max([layout.block_bytes, *(pool.arena.slot_bytes for pool in self._pools.values())])
        if largest > share:
            raise ConfigError(
                f"a layout's share of {share} bytes is less than a block of {largest}: lend more DRAM"
            )

    def _made(self, layout: KVLayout, share: int) -> MemPool:
        slot_bytes = -(-layout.block_bytes // _ALIGNMENT) * _ALIGNMENT
        room = min(share, self.budget_bytes - self._used_bytes())
        num_slots = min(room, max(self._step_bytes, slot_bytes)) // slot_bytes
        if num_slots < 1:
            for pool in self._pools.values():
                self._resize(pool, self._num_slots(pool, self._share(0)))
            raise OutOfBlocks(max(share // slot_bytes, 1), 0, 0)
        arena = Arena(layout.block_bytes, num_slots, max_slots=self.budget_bytes // slot_bytes)
        return MemPool(layout, arena, self._epoch, self._eviction)

    def _step(self, pool: MemPool, share: int) -> bool:
        """Shrink to the share, or grow towards it within the budget, at most to twice the size."""
        slot_bytes, before = pool.arena.slot_bytes, pool.arena.num_slots
        wanted = self._num_slots(pool, share)
        if wanted > before:
            room = (self.budget_bytes - self._used_bytes()) // slot_bytes
            step_bytes = min(max(self._step_bytes, before * slot_bytes), self._max_step_bytes)
            wanted = min(wanted, before + min(room, max(step_bytes // slot_bytes, 1)))
        return self._resize(pool, wanted)

    def _resize(self, pool: MemPool, num_slots: int) -> bool:
        """Resize as far as possible; returns whether the size has changed."""
        before = pool.arena.num_slots
        if num_slots == before:
            return False
        try:
            pool.resize(num_slots)
            if pool.arena.num_slots != before:
                self._on_resized(pool)
        except MemServeError as error:
            logger.warning("pool not resized layout=%s: %s", pool.layout.digest.hex()[:12], error)
        return pool.arena.num_slots != before


class LayoutUsage:
    """The last time at which each layout had a member. One thread."""

    def __init__(self, clock: Callable[[], float], unused_s: float) -> None:
        """A layout without a member for `unused_s` counts as unused."""
        self._clock = clock
        self._unused_s = unused_s
        self._used_s: dict[bytes, float] = {}

    def unused(self, digests: Iterable[bytes], of_members: Collection[str]) -> set[bytes]:
        """The `digests` that have not been among those of members (in hex) for `unused_s`."""
        now_s = self._clock()
        found = set()
        for digest in digests:
            if digest.hex() in of_members:
                self._used_s[digest] = now_s
            elif now_s - self._used_s.setdefault(digest, now_s) > self._unused_s:
                found.add(digest)
        return found
