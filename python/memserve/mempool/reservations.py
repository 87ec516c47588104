"""Slots promised to writers elsewhere, each promise ended exactly once.

    OPEN ---> committed: the slots are the receiver's, complete
      | ----> cancelled: nothing was or will be written
      '-----> QUARANTINED ---> settled: the writer is known to write no more

Knows no peers and no timeouts. Any thread.
"""

from __future__ import annotations

from memserve.core.block_addr import BlockAddr
from memserve.core.errors import BlockStateError
from memserve.mempool.allocator import FREE, PRIVATE, QUARANTINED, RESERVED, Slots
from memserve.mempool.records import Reservation
from memserve.mempool.tier_pool import TierPool


class WriteReservations:
    """Open and quarantined reservations of one tier, by id. Ids are never used twice.

    Ending one that is not in the right state raises BlockStateError, changing nothing.
    """

    def __init__(self, tier: TierPool) -> None:
        self._tier = tier
        self._open: dict[int, Slots] = {}
        self._quarantined: dict[int, Slots] = {}
        self._last_id = 0

    def __len__(self) -> int:
        return len(self._open) + len(self._quarantined)

    def begin(self, num_blocks: int) -> Reservation:
        """A new OPEN reservation. Evicts and raises as `TierPool.alloc`."""
        with self._tier.lock:
            slots = self._tier.cache.take(num_blocks, RESERVED)
            self._last_id += 1
            self._open[self._last_id] = slots
            return Reservation(self._last_id, self._tier.addrs(slots))

    def commit(self, reservation: Reservation) -> list[BlockAddr]:
        """OPEN: its slots, which are returned, are PRIVATE now."""
        with self._tier.lock:
            slots = _pop(self._open, reservation, "open")
            self._tier.cache.allocator.move(slots, RESERVED, PRIVATE)
            return self._tier.addrs(slots)

    def cancel(self, reservation: Reservation) -> None:
        """OPEN: its slots are FREE now."""
        with self._tier.lock:
            self._tier.cache.allocator.move(_pop(self._open, reservation, "open"), RESERVED, FREE)

    def quarantine(self, reservation: Reservation) -> None:
        """OPEN: its slots are QUARANTINED now, and so is it."""
        with self._tier.lock:
            slots = _pop(self._open, reservation, "open")
            self._quarantined[reservation.reservation_id] = slots
            self._tier.cache.allocator.move(slots, RESERVED, QUARANTINED)

    def settle(self, reservation: Reservation) -> None:
        """QUARANTINED: its slots are FREE now."""
        with self._tier.lock:
            slots = _pop(self._quarantined, reservation, "quarantined")
            self._tier.cache.allocator.move(slots, QUARANTINED, FREE)


def _pop(table: dict[int, Slots], reservation: Reservation, state: str) -> Slots:
    try:
        return table.pop(reservation.reservation_id)
    except KeyError:
        raise BlockStateError(f"reservation {reservation.reservation_id} is not {state}") from None
