"""The state that this process keeps for each peer that reads or writes its pools: one record per life.

    Hello ----> a session; the peer may write here under the data epochs of its Hellos
    deadline -> all its data epochs are refused: fence them, then settle the slots it wrote to

A Hello names a data epoch before any byte can arrive under it, and a late duplicate of a Hello only
repeats an epoch. So fencing all data epochs of a session fences every transport the peer can write by.
Knows no sockets. Not thread-safe: the server locks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from memserve.core.block_keys import BlockKey
from memserve.core.ids import Epoch
from memserve.mempool.leases import Lease
from memserve.mempool.pool import MemPool
from memserve.mempool.records import Reservation
from memserve.wire.messages import Message
from memserve.wire.peer_messages import Declined, Leased, Reserved

EXCHANGE_OVER = Declined("that exchange is over")


class CompletedExchange(NamedTuple):
    """The answers to repeated messages of a completed exchange."""

    begin: Message
    """To Reserve or AcquireLease."""
    commit: Message = EXCHANGE_OVER


class IdempotencyLog:
    """Completed exchanges by the peer's ascending ids: exact for the last ones, "over" for older ones."""

    def __init__(self, max_completed: int = 1024) -> None:
        """`max_completed`: completed exchanges whose answers are kept."""
        self._max_completed = max_completed
        self._completed: OrderedDict[int, CompletedExchange] = OrderedDict()
        self._floor = 0

    def add(self, exchange_id: int, completed: CompletedExchange) -> None:
        """The exchange has ended. An entry that exists stays as it is."""
        if self.get(exchange_id) is not None:
            return
        self._completed[exchange_id] = completed
        if len(self._completed) > self._max_completed:
            forgotten, _ = self._completed.popitem(last=False)
            self._floor = max(self._floor, forgotten)

    def get(self, exchange_id: int) -> CompletedExchange | None:
        """The answers of a completed exchange; None if it has not ended or not begun."""
        known = self._completed.get(exchange_id)
        return CompletedExchange(EXCHANGE_OVER) if known is None and exchange_id <= self._floor else known


@dataclass(eq=False, slots=True)
class IncomingWrite:
    """One reservation that a peer writes to."""

    pool: MemPool
    reservation: Reservation
    keys: tuple[BlockKey, ...]
    """How its blocks will be indexed."""
    parent: BlockKey | None
    pin: Lease | None
    """Keeps the parent from being evicted."""
    answer: Reserved
    deadline: float
    is_quarantined: bool = False

    def unpin(self) -> None:
        """Release the parent. Idempotent."""
        if self.pin is not None:
            self.pool.release(self.pin)
            self.pin = None


@dataclass(eq=False, slots=True)
class OutgoingRead:
    """One lease that a peer reads by."""

    pool: MemPool
    lease: Lease
    answer: Leased
    deadline: float


@dataclass(eq=False, slots=True)
class PeerSession:
    """One life of a peer."""

    epoch: Epoch
    data_epochs: set[Epoch] = field(default_factory=set)
    """The peer may write here under these."""
    to_fence: set[Epoch] = field(default_factory=set)
    """Refused, but not fenced by the transports yet."""
    writes: dict[int, IncomingWrite] = field(default_factory=dict)
    transfers: IdempotencyLog = field(default_factory=IdempotencyLog)
    reads: dict[int, OutgoingRead] = field(default_factory=dict)
    leases: IdempotencyLog = field(default_factory=IdempotencyLog)
    retry_at: float = 0.0
    """Time of the next attempt to fence it."""
    is_gone: bool = False

    @property
    def is_idle(self) -> bool:
        return not (self.writes or self.reads or self.to_fence)

    def quarantined(self) -> list[int]:
        """Transfer ids of the reservations in quarantine."""
        return [transfer_id for transfer_id, write in self.writes.items() if write.is_quarantined]

    def is_overdue(self, now: float) -> bool:
        """Whether the peer has to be fenced: a quarantine has passed its deadline."""
        return any(write.is_quarantined and write.deadline <= now for write in self.writes.values())

    def deadlines(self, now: float) -> Iterator[float]:
        """Times at which the sweeper has work with this session."""
        for write in self.writes.values():
            yield max(write.deadline, self.retry_at if write.is_quarantined else now)
        for read in self.reads.values():
            yield read.deadline
        if self.to_fence:
            yield self.retry_at


class PeerSessions:
    """All sessions, and the data epochs that are refused for good."""

    def __init__(self, max_sessions: int = 256, *, max_refused: int = 500) -> None:
        """The oldest idle sessions beyond `max_sessions` are forgotten: those peers repeat the handshake.

        `max_refused`: fenced data epochs that are remembered; transports remember as many.
        """
        self._max_sessions = max_sessions
        self._max_refused = max_refused
        self._sessions: OrderedDict[Epoch, PeerSession] = OrderedDict()
        self._refused: OrderedDict[Epoch, None] = OrderedDict()

    def __iter__(self) -> Iterator[PeerSession]:
        return iter(list(self._sessions.values()))

    def get(self, epoch: Epoch) -> PeerSession | None:
        return self._sessions.get(epoch)

    def writer(self, epoch: Epoch) -> PeerSession | None:
        """The session of a peer that has a data epoch to write under; else None."""
        session = self._sessions.get(epoch)
        return session if session is not None and session.data_epochs else None

    def admit(self, epoch: Epoch, data_epoch: Epoch) -> bool:
        """Open or extend a session. False, changing nothing, if the data epoch is refused."""
        if data_epoch in self._refused:
            return False
        session = self._sessions.setdefault(epoch, PeerSession(epoch))
        session.data_epochs.add(data_epoch)
        session.is_gone = False
        self._sessions.move_to_end(epoch)
        if len(self._sessions) > self._max_sessions:
            idle = [session for session in self if session.is_idle]
            for session in idle[: len(self._sessions) - self._max_sessions]:
                del self._sessions[session.epoch]
        return True

    def refuse(self, session: PeerSession) -> None:
        """Refuse all data epochs of the session: they are to be fenced."""
        for data_epoch in session.data_epochs:
            self._refused[data_epoch] = None
        while len(self._refused) > self._max_refused:
            self._refused.popitem(last=False)
        session.to_fence |= session.data_epochs
        session.data_epochs.clear()

    def gone(self, epoch: Epoch) -> PeerSession:
        """The peer's session, made if there was none, refused; it is forgotten once it is idle."""
        session = self._sessions.setdefault(epoch, PeerSession(epoch))
        session.data_epochs.add(epoch)
        session.is_gone = True
        self.refuse(session)
        return session

    def forget_gone(self) -> None:
        """Drop the idle sessions of peers that are gone."""
        for session in self:
            if session.is_gone and session.is_idle:
                del self._sessions[session.epoch]
