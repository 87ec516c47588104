"""What a process knows of each peer that reads or writes its pools: one record per life of the peer.

    Hello ----> a guest, its data epochs may write here
    deadline -> all its data epochs are refused: to be fenced, then what it wrote to is settled

Data epochs are told by Hello before a byte can arrive under them, and a late duplicate of a Hello
only ever adds one that has been told before, so fencing all of a guest's fences all it can write by.
Knows no sockets. Not thread-safe: its server locks.
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

MAX_SESSIONS = 256
"""Idle ones beyond that are forgotten, oldest first: they say Hello again."""
MAX_REFUSED = 500
"""Fenced data epochs that are remembered; transports remember as many."""
MAX_OVER = 1024
"""Finished exchanges of one guest whose answers are kept."""

OVER = Declined("that exchange is over")


class CompletedExchange(NamedTuple):
    """What repeated messages of a finished exchange are answered."""

    begin: Message
    """To Reserve or AcquireLease."""
    commit: Message = OVER


class IdempotencyLog:
    """Finished exchanges by their peer's ascending ids: exact for the last ones, "over" for the others."""

    def __init__(self) -> None:
        self._over: OrderedDict[int, CompletedExchange] = OrderedDict()
        self._floor = 0

    def add(self, exchange_id: int, over: CompletedExchange) -> None:
        """The exchange has ended so. What was known of it already stays."""
        if self.get(exchange_id) is not None:
            return
        self._over[exchange_id] = over
        if len(self._over) > MAX_OVER:
            forgotten, _ = self._over.popitem(last=False)
            self._floor = max(self._floor, forgotten)

    def get(self, exchange_id: int) -> CompletedExchange | None:
        """None if it has not ended, nor begun."""
        known = self._over.get(exchange_id)
        return CompletedExchange(OVER) if known is None and exchange_id <= self._floor else known


@dataclass(eq=False, slots=True)
class IncomingWrite:
    """One reservation that a guest writes to."""

    pool: MemPool
    reservation: Reservation
    keys: tuple[BlockKey, ...]
    """How its blocks will be indexed."""
    parent: BlockKey | None
    pin: Lease | None
    """Keeps what they come after from being evicted."""
    answer: Reserved
    deadline: float
    is_quarantined: bool = False

    def unpin(self) -> None:
        """Let what they come after go. Idempotent."""
        if self.pin is not None:
            self.pool.release(self.pin)
            self.pin = None


@dataclass(eq=False, slots=True)
class OutgoingRead:
    """One lease that a guest reads by."""

    pool: MemPool
    lease: Lease
    answer: Leased
    deadline: float


@dataclass(eq=False, slots=True)
class PeerSession:
    """One life of a peer."""

    epoch: Epoch
    data_epochs: set[Epoch] = field(default_factory=set)
    """It may write here by these."""
    to_fence: set[Epoch] = field(default_factory=set)
    """It must not any more, but the transports do not see to that yet."""
    incoming: dict[int, IncomingWrite] = field(default_factory=dict)
    transfers: IdempotencyLog = field(default_factory=IdempotencyLog)
    lent: dict[int, OutgoingRead] = field(default_factory=dict)
    leases: IdempotencyLog = field(default_factory=IdempotencyLog)
    retry_at: float = 0.0
    """When to try again to fence it."""
    is_gone: bool = False

    @property
    def is_idle(self) -> bool:
        return not (self.incoming or self.lent or self.to_fence)

    def quarantined(self) -> list[int]:
        """Ids of its reservations that are in quarantine."""
        return [one for one, incoming in self.incoming.items() if incoming.is_quarantined]

    def is_overdue(self, now: float) -> bool:
        """Whether it has to be fenced: something in quarantine has waited long enough."""
        return any(one.is_quarantined and one.deadline <= now for one in self.incoming.values())

    def deadlines(self, now: float) -> Iterator[float]:
        """When something has to be done about it."""
        for incoming in self.incoming.values():
            yield max(incoming.deadline, self.retry_at if incoming.is_quarantined else now)
        for lent in self.lent.values():
            yield lent.deadline
        if self.to_fence:
            yield self.retry_at


class PeerSessions:
    """All guests, and the data epochs that are refused for good."""

    def __init__(self) -> None:
        self._guests: OrderedDict[Epoch, PeerSession] = OrderedDict()
        self._refused: OrderedDict[Epoch, None] = OrderedDict()

    def __iter__(self) -> Iterator[PeerSession]:
        return iter(list(self._guests.values()))

    def get(self, epoch: Epoch) -> PeerSession | None:
        return self._guests.get(epoch)

    def writer(self, epoch: Epoch) -> PeerSession | None:
        """A guest that has a data epoch it may write by."""
        guest = self._guests.get(epoch)
        return guest if guest is not None and guest.data_epochs else None

    def welcome(self, epoch: Epoch, data_epoch: Epoch) -> bool:
        """Admit a guest under a data epoch. False, changing nothing, if that is refused."""
        if data_epoch in self._refused:
            return False
        guest = self._guests.setdefault(epoch, PeerSession(epoch))
        guest.data_epochs.add(data_epoch)
        guest.is_gone = False
        self._guests.move_to_end(epoch)
        if len(self._guests) > MAX_SESSIONS:
            for idle in [one for one in self if one.is_idle][: len(self._guests) - MAX_SESSIONS]:
                del self._guests[idle.epoch]
        return True

    def refuse(self, guest: PeerSession) -> None:
        """Its data epochs are to be fenced."""
        for data_epoch in guest.data_epochs:
            self._refused[data_epoch] = None
        while len(self._refused) > MAX_REFUSED:
            self._refused.popitem(last=False)
        guest.to_fence |= guest.data_epochs
        guest.data_epochs.clear()

    def gone(self, epoch: Epoch) -> PeerSession:
        """The guest, known or not, refused; forgotten once it is idle."""
        guest = self._guests.setdefault(epoch, PeerSession(epoch))
        guest.data_epochs.add(epoch)
        guest.is_gone = True
        self.refuse(guest)
        return guest

    def forget_gone(self) -> None:
        """Drop those that are gone and owe nothing."""
        for guest in self:
            if guest.is_gone and guest.is_idle:
                del self._guests[guest.epoch]
