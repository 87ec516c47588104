"""One budget of DRAM for blocks of any layout: a pool for each layout that peers bring.

    first layout: all of it     second: half each     n-th: an n-th each, the others shrink

A pool shrinks by evicting; what somebody reads or writes just then stays, and goes later. Knows no
peers and no router. Pools are never given up: layouts are models, and few.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from memserve.core.errors import ConfigError, MemServeError, OutOfBlocks
from memserve.core.ids import Epoch
from memserve.core.kv_layout import KVLayout
from memserve.mempool.arena import Arena
from memserve.mempool.pool import MemPool

logger = logging.getLogger(__name__)

MAX_LAYOUTS = 64
STEP_BYTES = 1 << 28
"""A new pool begins with no more than this: taking memory takes time, and a peer waits for it."""
MAX_STEP_BYTES = 1 << 32
"""And no pool grows by more than this at once."""
_ALIGNMENT = 64
"""Of an arena's slots."""


class LentMemory:
    """The pools of one process. Any thread; pools are made and resized one at a time."""

    def __init__(
        self,
        budget_bytes: int,
        epoch: Epoch,
        *,
        on_resized: Callable[[MemPool], None],
        step_bytes: int = STEP_BYTES,
    ) -> None:
        """`epoch` is the process's; nothing is taken yet.

        `on_resized` is told of each pool whose arena has another size. It may raise a MemServeError,
        which is logged.
        """
        self.budget_bytes = budget_bytes
        self._epoch = epoch
        self._on_resized = on_resized
        self._step_bytes = step_bytes
        self._changing = threading.Lock()
        self._pools: dict[bytes, MemPool] = {}

    def pools(self) -> tuple[MemPool, ...]:
        """Those there are, the oldest first."""
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
            share = self._share(len(self._pools) + 1)
            self._check(layout, share)
            for pool in self._pools.values():
                self._resize(pool, min(pool.arena.num_slots, share // pool.arena.slot_bytes))
            self._pools[layout.digest] = pool = self._made(layout, share)
        logger.info(
            "memory lent layout=%s blocks=%d layouts=%d",
            layout.digest.hex()[:12],
            pool.arena.num_slots,
            len(self._pools),
        )
        return pool

    def balance(self) -> bool:
        """Bring each pool one step nearer to its share; whether that has changed anything."""
        with self._changing:
            share = self._share(len(self._pools) or 1)
            changed = [self._step(pool, share) for pool in self._pools.values()]
        return any(changed)

    def close(self) -> None:
        """Give all memory back; nobody may use the pools."""
        with self._changing:
            for pool in self._pools.values():
                pool.arena.close()
            self._pools.clear()

    def _share(self, num_layouts: int) -> int:
        return self.budget_bytes // num_layouts

    def _used_bytes(self) -> int:
        return sum(pool.arena.slot_bytes * pool.arena.num_slots for pool in self._pools.values())

    def _check(self, layout: KVLayout, share: int) -> None:
        if len(self._pools) >= MAX_LAYOUTS:
            raise ConfigError(f"this memory is lent to {MAX_LAYOUTS} layouts already, and takes no other")
        largest = max([layout.block_bytes, *(pool.arena.slot_bytes for pool in self._pools.values())])
        if largest > share:
            raise ConfigError(
                f"a share of {share} bytes for each of {len(self._pools) + 1} layouts is less than a block "
                f"of {largest}: lend more DRAM"
            )

    def _made(self, layout: KVLayout, share: int) -> MemPool:
        slot_bytes = -(-layout.block_bytes // _ALIGNMENT) * _ALIGNMENT
        room = min(share, self.budget_bytes - self._used_bytes())
        num_slots = min(room, max(self._step_bytes, slot_bytes)) // slot_bytes
        if num_slots < 1:
            for pool in self._pools.values():
                self._resize(pool, self._share(len(self._pools)) // pool.arena.slot_bytes)
            raise OutOfBlocks(max(share // slot_bytes, 1), 0, 0)
        arena = Arena(layout.block_bytes, num_slots, max_slots=self.budget_bytes // slot_bytes)
        return MemPool(layout, arena, self._epoch)

    def _step(self, pool: MemPool, share: int) -> bool:
        """Shrink to the share; or grow towards it, as far as the budget goes, at most to the double."""
        slot_bytes, before = pool.arena.slot_bytes, pool.arena.num_slots
        wanted = share // slot_bytes
        if wanted > before:
            room = (self.budget_bytes - self._used_bytes()) // slot_bytes
            step_bytes = min(max(self._step_bytes, before * slot_bytes), MAX_STEP_BYTES)
            wanted = min(wanted, before + min(room, max(step_bytes // slot_bytes, 1)))
        return self._resize(pool, wanted)

    def _resize(self, pool: MemPool, num_slots: int) -> bool:
        """Whether it has another size now; it may keep more than it should."""
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
