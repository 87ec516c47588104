"""Reservations that peers write to: every message about one, in any order and number, and its end.

    Reserve --> OPEN --- Commit ---> checksums computed and compared, blocks indexed
                 | \\--- Cancel, settled ---> free
                 '-- Cancel, not settled; deadline --> QUARANTINED -- settled --> free

Knows no sockets, no transports and no clock: the time is an argument. Not thread-safe: its server locks.
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
from memserve.mempool.remote.sessions import OVER, CompletedExchange, IncomingWrite, PeerSession
from memserve.wire.messages import Done, Message
from memserve.wire.peer_messages import Cancel, Commit, Committed, Declined, Reserve, Reserved

logger = logging.getLogger(__name__)

_UNKNOWN = Declined("no such reservation")
_RUN_OUT = Declined("the reservation has run out")


class PeerReservations:
    """The receiver's half of reserve, write, commit."""

    def __init__(self, tally: Counters, reservation_s: float) -> None:
        self._tally = tally
        self._reservation_s = reservation_s

    # ---- messages

    def reserve(self, guest: PeerSession, pool: MemPool, message: Reserve, now: float) -> Message:
        """Slots for what is missing of a chain, after pinning what it comes after."""
        seen = _answered(guest, message.transfer_id)
        if seen is not None:
            return seen
        keys = message.keys
        num_known = pool.num_cached(keys)
        last = keys[num_known - 1] if num_known else message.parent
        pin = None
        if last is not None:
            pin = pinned(pool, last)
            if pin is None:
                return self._declined(guest, message.transfer_id, Declined("its parent is not here", True))
        missing = keys[num_known:]
        if not missing:
            if pin is not None:
                pool.release(pin)
            answer = Reserved(num_known, ())
            guest.transfers.add(message.transfer_id, CompletedExchange(answer))
            return answer
        try:
            reservation = pool.reserve(len(missing))
        except OutOfBlocks as error:
            if pin is not None:
                pool.release(pin)
            return self._declined(guest, message.transfer_id, Declined(str(error)))
        answer = Reserved(num_known, tuple(reservation.addrs))
        deadline = now + self._reservation_s
        guest.incoming[message.transfer_id] = IncomingWrite(
            pool, reservation, missing, last, pin, answer, deadline
        )
        return answer

    def commit(self, guest: PeerSession, message: Commit) -> Message:
        """Take what was written, if it sums to what the sender says. Reads the bytes.

        Raises BlockStateError, changing nothing, if the message does not fit the reservation.
        """
        incoming = guest.incoming.get(message.transfer_id)
        if incoming is None:
            over = guest.transfers.get(message.transfer_id)
            return _UNKNOWN if over is None else over.commit
        if incoming.is_quarantined:
            return _RUN_OUT
        num_blocks = len(incoming.reservation.addrs)
        if len(message.checksums) != num_blocks:
            raise BlockStateError(f"{len(message.checksums)} checksums, {num_blocks} blocks")
        addrs = incoming.pool.commit(incoming.reservation)
        sums = incoming.pool.seal(addrs)
        good = num_equal(sums, message.checksums)
        if good < num_blocks:
            self._tally.add(PeersStats(corrupt_in_flight=1))
            logger.error("block corrupt on arrival from=%016x block=%d of=%d", guest.epoch, good, num_blocks)
        num_new = indexed(incoming.pool, incoming.keys, addrs, good, incoming.parent)
        self._tally.add(PeersStats(blocks_received=num_new))
        answer = Committed(num_new)
        self._end(guest, message.transfer_id, CompletedExchange(OVER, answer))
        return answer

    def cancel(self, guest: PeerSession, message: Cancel) -> Message:
        """End a reservation, or keep it from everybody if its writer may still write."""
        incoming = guest.incoming.get(message.transfer_id)
        if incoming is None:
            guest.transfers.add(message.transfer_id, CompletedExchange(OVER))
        elif not message.settled:
            self._quarantine(incoming)
        elif incoming.is_quarantined:
            self.settle(guest, [message.transfer_id])
        else:
            incoming.pool.cancel(incoming.reservation)
            self._end(guest, message.transfer_id, CompletedExchange(OVER))
        return Done()

    # ---- time

    def expire(self, guest: PeerSession, now: float) -> None:
        """Quarantine what should have ended by now."""
        for transfer_id, incoming in guest.incoming.items():
            if incoming.deadline <= now and not incoming.is_quarantined:
                self._quarantine(incoming)
                self._tally.add(PeersStats(expired_reservations=1))
                logger.warning(
                    "reservation ran out peer=%016x transfer=%d blocks=%d",
                    guest.epoch,
                    transfer_id,
                    len(incoming.reservation.addrs),
                )

    def abandon(self, guest: PeerSession, now: float) -> None:
        """Its process is gone: nothing of it is waited for."""
        for incoming in guest.incoming.values():
            incoming.deadline = now
            self._quarantine(incoming)

    def settle(self, guest: PeerSession, transfer_ids: Sequence[int]) -> None:
        """No byte can land there any more: those in quarantine that have not ended yet are free."""
        for transfer_id in transfer_ids:
            incoming = guest.incoming.get(transfer_id)
            if incoming is not None and incoming.is_quarantined:
                incoming.pool.settle(incoming.reservation)
                self._end(guest, transfer_id, CompletedExchange(OVER))

    def _declined(self, guest: PeerSession, transfer_id: int, answer: Declined) -> Declined:
        guest.transfers.add(transfer_id, CompletedExchange(answer))
        self._tally.add(PeersStats(declined=1))
        return answer

    def _quarantine(self, incoming: IncomingWrite) -> None:
        if not incoming.is_quarantined:
            incoming.pool.quarantine(incoming.reservation)
            incoming.is_quarantined = True
            incoming.unpin()

    def _end(self, guest: PeerSession, transfer_id: int, over: CompletedExchange) -> None:
        guest.incoming.pop(transfer_id).unpin()
        guest.transfers.add(transfer_id, over)


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
    """How many checksums, from the front, agree."""
    for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if one != other:
            return i
    return len(ours)


def indexed(
    pool: MemPool, keys: Sequence[BlockKey], addrs: Sequence[BlockAddr], good: int, parent: BlockKey | None
) -> int:
    """Index the first `good` of these sealed blocks and free the others; returns how many are new.

    What is a duplicate, or comes after nothing that is cached, is freed, too.
    """
    inserted = pool.insert(keys[:good], addrs[:good], parent)
    pool.free_mem([*inserted.duplicates, *inserted.orphans, *addrs[good:]])
    return len(inserted.new)


def _answered(guest: PeerSession, transfer_id: int) -> Message | None:
    """What was said when the transfer began, if it has."""
    incoming = guest.incoming.get(transfer_id)
    if incoming is not None:
        return _RUN_OUT if incoming.is_quarantined else incoming.answer
    over = guest.transfers.get(transfer_id)
    return None if over is None else over.begin
