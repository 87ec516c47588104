"""Slots promised to remote writers. Each promise ends exactly once.

    OPEN ---> committed: the slots are the receiver's, complete
      | ----> cancelled: no byte was or will be written
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
    """Open and quarantined reservations of one tier, by id. Ids are never used twice."""

    def __init__(self, tier: TierPool) -> None:
        self._reserving = tier
        self._open: dict[int, Slots] = {}
        self._quarantined: dict[int, Slots] = {}
        self._last_id = 0

    @property
    def num_reservations(self) -> int:
        """Reservations that have not ended, the quarantined ones included."""
        return len(self._open) + len(self._quarantined)

    def reserve(self, num_blocks: int) -> Reservation:
        """Promise blocks to a remote writer. Evicts and raises as `MemPool.alloc_mem`."""
        tier = self._reserving
        with tier.lock:
            slots = tier.cache.take(num_blocks, RESERVED)
            self._last_id += 1
            self._open[self._last_id] = slots
            return Reservation(self._last_id, tier.addrs(slots))

    def commit(self, reservation: Reservation) -> list[BlockAddr]:
        """All bytes have landed: the blocks are the caller's, PRIVATE, to seal and insert.

        Raises BlockStateError, changing nothing, if the reservation has ended or is quarantined.
        """
        tier = self._reserving
        with tier.lock:
            slots = _pop(self._open, reservation, "open")
            tier.cache.allocator.move(slots, RESERVED, PRIVATE)
            return tier.addrs(slots)

    def cancel(self, reservation: Reservation) -> None:
        """No byte was or will be written: free the blocks. Raises as `commit`."""
        with self._reserving.lock:
            self._reserving.cache.allocator.move(_pop(self._open, reservation, "open"), RESERVED, FREE)

    def quarantine(self, reservation: Reservation) -> None:
        """The writer may still write: keep the blocks until `settle`. Raises as `commit`."""
        with self._reserving.lock:
            slots = _pop(self._open, reservation, "open")
            self._quarantined[reservation.reservation_id] = slots
            self._reserving.cache.allocator.move(slots, RESERVED, QUARANTINED)

    def settle(self, reservation: Reservation) -> None:
        """The writer has acknowledged, is fenced or is dead: free a quarantined reservation's blocks.

        Raises BlockStateError, changing nothing, if it is not quarantined.
        """
        with self._reserving.lock:
            slots = _pop(self._quarantined, reservation, "quarantined")
            self._reserving.cache.allocator.move(slots, QUARANTINED, FREE)


def _pop(table: dict[int, Slots], reservation: Reservation, state: str) -> Slots:
    try:
        return table.pop(reservation.reservation_id)
    except KeyError:
        raise BlockStateError(f"reservation {reservation.reservation_id} is not {state}") from None
