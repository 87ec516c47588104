"""Reservations that peers write to: every message about one, in any order and number, and its end.

    Reserve --> OPEN --- Commit ---> checksums computed and compared, blocks indexed
                 | \\--- Cancel, settled ---> free
                 '-- Cancel, not settled; deadline --> QUARANTINED -- settled --> free

Knows no sockets, no transports and no clock: the time is an argument. Not thread-safe: the server locks.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from memserve.core.block_addr import BlockAddr
from memserve.core.block_keys import BlockKey
from memserve.core.errors import BlockStateError, OutOfBlocks
from memserve.mempool.leases import Lease
from memserve.mempool.pool import MemPool
from memserve.mempool.remote.records import Counters, PeersStats
from memserve.mempool.remote.sessions import EXCHANGE_OVER, CompletedExchange, IncomingWrite, PeerSession
from memserve.wire.messages import Done, Message
from memserve.wire.peer_messages import Cancel, Commit, Committed, Declined, Reserve, Reserved

logger = logging.getLogger(__name__)

_UNKNOWN = Declined("no such reservation")
_RUN_OUT = Declined("the reservation has run out")


class PeerReservations:
    """The receiver's half of reserve, write, commit."""

    def __init__(self, counters: Counters, reservation_s: float) -> None:
        self._counters = counters
        self._reservation_s = reservation_s

    # ---- messages

    def reserve(self, session: PeerSession, pool: MemPool, message: Reserve, now: float) -> Message:
        """Pin the parent of the missing blocks of a chain, and reserve slots for them."""
        seen = _answered(session, message.transfer_id)
        if seen is not None:
            return seen
        keys = message.keys
        num_known = pool.num_cached(keys)
        last = keys[num_known - 1] if num_known else message.parent
        pin = None
        if last is not None:
            pin = pinned(pool, last)
            if pin is None:
                return self._decline(session, message.transfer_id, Declined("its parent is not here", True))
        missing = keys[num_known:]
        if not missing:
            if pin is not None:
                pool.release(pin)
            answer = Reserved(num_known, ())
            session.transfers.add(message.transfer_id, CompletedExchange(answer))
            return answer
        try:
            reservation = pool.reserve(len(missing))
        except OutOfBlocks as error:
            if pin is not None:
                pool.release(pin)
            return self._decline(session, message.transfer_id, Declined(str(error)))
        answer = Reserved(num_known, tuple(reservation.addrs))
        deadline = now + self._reservation_s
        session.writes[message.transfer_id] = IncomingWrite(
            pool, reservation, missing, last, pin, answer, deadline
        )
        return answer

    def commit(self, session: PeerSession, message: Commit) -> Message:
        """Index the written blocks whose checksums are those of the message. Reads the bytes.

        Raises BlockStateError, changing nothing, if the message does not fit the reservation.
        """
        write = session.writes.get(message.transfer_id)
        if write is None:
            completed = session.transfers.get(message.transfer_id)
            return _UNKNOWN if completed is None else completed.commit
        if write.is_quarantined:
            return _RUN_OUT
        num_blocks = len(write.reservation.addrs)
        if len(message.checksums) != num_blocks:
            raise BlockStateError(f"{len(message.checksums)} checksums, {num_blocks} blocks")
        addrs = write.pool.commit(write.reservation)
        good = num_equal(write.pool.seal(addrs), message.checksums)
        if good < num_blocks:
            self._counters.add(PeersStats(corrupt_in_flight=1))
            logger.error(
                "block corrupt on arrival from=%016x block=%d of=%d", session.epoch, good, num_blocks
            )
        num_new = indexed(write.pool, write.keys, addrs, good, write.parent)
        self._counters.add(PeersStats(blocks_received=num_new))
        answer = Committed(num_new)
        self._end(session, message.transfer_id, CompletedExchange(EXCHANGE_OVER, answer))
        return answer

    def cancel(self, session: PeerSession, message: Cancel) -> Message:
        """End a reservation, or quarantine it if the peer's bytes may still land."""
        write = session.writes.get(message.transfer_id)
        if write is None:
            session.transfers.add(message.transfer_id, CompletedExchange(EXCHANGE_OVER))
        elif not message.settled:
            self._quarantine(write)
        elif write.is_quarantined:
            self.settle(session, [message.transfer_id])
        else:
            write.pool.cancel(write.reservation)
            self._end(session, message.transfer_id, CompletedExchange(EXCHANGE_OVER))
        return Done()

    # ---- time

    def expire(self, session: PeerSession, now: float) -> None:
        """Quarantine the reservations that have passed their deadline."""
        for transfer_id, write in session.writes.items():
            if write.deadline <= now and not write.is_quarantined:
                self._quarantine(write)
                self._counters.add(PeersStats(expired_reservations=1))
                logger.warning(
                    "reservation ran out peer=%016x transfer=%d blocks=%d",
                    session.epoch,
                    transfer_id,
                    len(write.reservation.addrs),
                )

    def abandon(self, session: PeerSession, now: float) -> None:
        """The peer's process is gone: quarantine its reservations, with the deadline now."""
        for write in session.writes.values():
            write.deadline = now
            self._quarantine(write)

    def settle(self, session: PeerSession, transfer_ids: Sequence[int]) -> None:
        """No byte can land any more: free those of these reservations that are in quarantine."""
        for transfer_id in transfer_ids:
            write = session.writes.get(transfer_id)
            if write is not None and write.is_quarantined:
                write.pool.settle(write.reservation)
                self._end(session, transfer_id, CompletedExchange(EXCHANGE_OVER))

    def _decline(self, session: PeerSession, transfer_id: int, answer: Declined) -> Declined:
        session.transfers.add(transfer_id, CompletedExchange(answer))
        self._counters.add(PeersStats(declined=1))
        return answer

    def _quarantine(self, write: IncomingWrite) -> None:
        if not write.is_quarantined:
            write.pool.quarantine(write.reservation)
            write.is_quarantined = True
            write.unpin()

    def _end(self, session: PeerSession, transfer_id: int, completed: CompletedExchange) -> None:
        session.writes.pop(transfer_id).unpin()
        session.transfers.add(transfer_id, completed)


def pinned(pool: MemPool, key: BlockKey) -> Lease | None:
    """A lease on the chain that ends with `key`, or None if it is not cached."""
    match = pool.match([key])
    if not len(match):
        return None
    lease = pool.acquire(match)
    if not len(lease):
        pool.release(lease)
        return None
    return lease


def num_equal(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """The number of checksums, from the front, that agree."""
    for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if one != other:
            return i
    return len(ours)


def indexed(
    pool: MemPool, keys: Sequence[BlockKey], addrs: Sequence[BlockAddr], good: int, parent: BlockKey | None
) -> int:
    """Index the first `good` of these sealed blocks and free the others; returns how many are new.

    Duplicates, and blocks whose parent is not cached, are freed as well.
    """
    inserted = pool.insert(keys[:good], addrs[:good], parent)
    pool.free_mem([*inserted.duplicates, *inserted.orphans, *addrs[good:]])
    return len(inserted.new)


def _answered(session: PeerSession, transfer_id: int) -> Message | None:
    """The answer to the Reserve of this transfer, if one was given."""
    write = session.writes.get(transfer_id)
    if write is not None:
        return _RUN_OUT if write.is_quarantined else write.answer
    completed = session.transfers.get(transfer_id)
    return None if completed is None else completed.begin
