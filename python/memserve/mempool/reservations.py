"""Slots promised to writers elsewhere, each promise ended exactly once.

    OPEN ---> committed: the slots are the receiver's, complete
      | ----> cancelled: nothing was or will be written
      '-----> QUARANTINED ---> settled: the writer is known to write no more

Knows no peers and no timeouts. Not thread-safe: its pool locks.
"""

from __future__ import annotations

from memserve.core.errors import BlockStateError
from memserve.mempool.allocator import Slots


class Reservations:
    """Open and quarantined reservations by id. Ids are never used twice."""

    def __init__(self) -> None:
        self._open: dict[int, Slots] = {}
        self._quarantined: dict[int, Slots] = {}
        self._last_id = 0

    def __len__(self) -> int:
        return len(self._open) + len(self._quarantined)

    def begin(self, slots: Slots) -> int:
        """A new OPEN reservation of these slots; returns its id."""
        self._last_id += 1
        self._open[self._last_id] = slots
        return self._last_id

    def end(self, reservation_id: int) -> Slots:
        """End an OPEN one; returns its slots. Raises BlockStateError if there is none of that id."""
        return _pop(self._open, reservation_id, "open")

    def quarantine(self, reservation_id: int) -> Slots:
        """An OPEN one becomes QUARANTINED; returns its slots. Raises as `end`."""
        slots = _pop(self._open, reservation_id, "open")
        self._quarantined[reservation_id] = slots
        return slots

    def settle(self, reservation_id: int) -> Slots:
        """End a QUARANTINED one; returns its slots. Raises BlockStateError if there is none of that id."""
        return _pop(self._quarantined, reservation_id, "quarantined")


def _pop(table: dict[int, Slots], reservation_id: int, state: str) -> Slots:
    try:
        return table.pop(reservation_id)
    except KeyError:
        raise BlockStateError(f"reservation {reservation_id} is not {state}") from None
