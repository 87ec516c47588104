"""One life of another process's pool of one layout: how it is asked, and how its memory is reached.

    first use:      Hello(data epoch) → Welcome(transports, arena)    then the best transport connects
    is_fenced:      our transports begin a new life, and Hello again
    Unknown, a region or a life that is over:                         Hello again, once

Knows what to say to whom, not why: `sending` and `reading` do.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from memserve.core.block_addr import BlockAddr, slot_of
from memserve.core.errors import (
    InstanceLost,
    LayoutMismatch,
    MemServeError,
    OutOfBounds,
    PeerDeclined,
    StaleEpoch,
    TransferFailed,
    WireMismatch,
)
from memserve.core.ids import Epoch
from memserve.core.kv_layout import Extents
from memserve.mempool.pool import MemPool
from memserve.mempool.remote.config import PeerAddress
from memserve.mempool.remote.faults import HandshakeRequired
from memserve.mempool.remote.local_regions import LocalRegions
from memserve.transport.base import Peer, Transport
from memserve.transport.copies import Copies
from memserve.transport.regions import Region, RegionTable
from memserve.transport.registry import connect_best
from memserve.wire.messages import Message, Refused, Unknown
from memserve.wire.peer_messages import Declined, Hello, Welcome

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class ControlLink(Protocol):
    """What of `wire.link.ControlClient` is needed: a faulty one for tests has it, too."""

    def request(self, message: Message, *, timeout_s: float) -> Message: ...

    def close(self) -> None: ...


Connect = Callable[[str], ControlLink]


@dataclass(frozen=True, slots=True)
class PeerConnection:
    """The peer's arena as one of our transports' lives reaches it."""

    own_epoch: Epoch
    transport: Transport
    peer: Peer
    region_id: int
    slot_bytes: int


class RemotePool:
    """Any thread may call anything; requests of several threads do not wait for each other."""

    def __init__(
        self,
        address: PeerAddress,
        pool: MemPool,
        own: tuple[Epoch, LocalRegions],
        connect: Connect,
        timeout_s: float,
    ) -> None:
        """Nothing is sent before the first use. `own`: this process's epoch, and its memory."""
        self.address = address
        self.name = str(address)
        self.pool = pool
        self.timeout_s = timeout_s
        self.epoch, self._memory = own
        self._connect = connect
        self._lock = threading.Lock()
        self._hello_lock = threading.Lock()
        self._reached: PeerConnection | None = None
        self._last_reached: PeerConnection | None = None
        self._idle: list[ControlLink] = []
        self._is_closed = False

    def exchange(self, action: Callable[[PeerConnection], Result]) -> Result:
        """Run `action` on the peer's arena, which stays reachable meanwhile; once more after a new Hello.

        Errors of `action`, after which nothing that was known is relied on; StaleEpoch if the
        process there is another one, PeerDeclined if the two do not come together.
        """
        for is_last in (False, True):
            reached = self.reach(self.timeout_s)
            try:
                with self._memory.hold(reached.own_epoch):
                    return action(reached)
            except PeerDeclined:
                raise
            except (HandshakeRequired, OutOfBounds, StaleEpoch) as error:
                self._forget(reached)
                if is_last:
                    if isinstance(error, HandshakeRequired):
                        raise PeerDeclined(self.name, str(error)) from error
                    raise
            except MemServeError:
                self._forget(reached)
                raise
        raise AssertionError("unreachable")

    def ask(self, message: Message, *, timeout_s: float | None = None, attempts: int = 2) -> Message:
        """The peer's answer. Asks again if it is lost: all messages are idempotent.

        Raises InstanceLost, WireMismatch, or HandshakeRequired if the peer does not know us.
        """
        answer = self._asked(message, self.timeout_s if timeout_s is None else timeout_s, attempts)
        if isinstance(answer, Unknown):
            raise HandshakeRequired(f"{self.name} does not know epoch {self.epoch:016x}")
        if isinstance(answer, Refused):
            raise WireMismatch(f"{self.name} refused {type(message).__name__}: {answer.reason}")
        return answer

    def copies(
        self,
        reached: PeerConnection,
        own: Sequence[BlockAddr],
        theirs: Sequence[BlockAddr] | Sequence[int],
        extents: Extents,
    ) -> Copies:
        """The copies of these extents of blocks of ours from or to blocks of theirs."""
        region = self._memory.served(self.pool).region.region_id
        offsets = np.array(extents.offsets, np.int64)
        starts = np.array(self.pool.slots(own), np.int64) * self.pool.arena.slot_bytes
        slots = np.array([slot_of(BlockAddr(addr)) for addr in theirs], np.int64)
        local = (starts[:, None] + offsets).ravel()
        remote = (slots[:, None] * reached.slot_bytes + offsets).ravel()
        lengths = np.tile(np.array(extents.lengths, np.int64), len(starts))
        ones = np.ones(len(local), np.int64)
        return Copies(ones * region, local, ones * reached.region_id, remote, lengths)

    def reach(self, timeout_s: float) -> PeerConnection:
        """Introduce ourselves, if that has not been done. Each step takes up to `timeout_s`.

        Raises StaleEpoch, LayoutMismatch, PeerDeclined, InstanceLost, TransferFailed.
        """
        reached = self._reached
        if reached is not None:
            return reached
        with self._hello_lock:
            if self._reached is None:
                self._reached = self._last_reached = self._introduced(timeout_s)
            return self._reached

    def close(self) -> None:
        """Let go of the peer, and of what may be in doubt with it; running requests end as they would."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
            reached, self._reached = self._last_reached, None
        for link in idle:
            link.close()
        if reached is not None:
            reached.transport.disconnect(reached.peer)

    def _introduced(self, timeout_s: float) -> PeerConnection:
        for _ in range(2):
            served = self._memory.served(self.pool)
            hello = Hello(self.epoch, self.address.epoch, served.epoch, self.pool.layout)
            answer = self._asked(hello, timeout_s, 2)
            if isinstance(answer, Refused):
                raise LayoutMismatch(f"{self.name}: {answer.reason}")
            if isinstance(answer, Declined):
                raise PeerDeclined(self.name, answer.reason)
            if not isinstance(answer, Welcome):
                raise WireMismatch(f"{self.name} did not say how its memory is reached: {answer}")
            if answer.epoch != self.address.epoch:
                raise StaleEpoch(self.name, self.address.epoch, answer.epoch)
            if not answer.is_fenced:
                return self._connected(answer, served.epoch, served.transports, timeout_s)
            self._memory.reopen(served.epoch)
        raise TransferFailed(self.name, "it has fenced this process")

    def _connected(
        self, welcome: Welcome, own_epoch: Epoch, transports: Sequence[Transport], timeout_s: float
    ) -> PeerConnection:
        table = RegionTable()
        table.add(Region(welcome.arena.region_id, welcome.arena.address, welcome.arena.num_bytes))
        offered = {endpoint.transport: endpoint.address for endpoint in welcome.endpoints}
        transport, peer = connect_best(
            transports, self.name, welcome.data_epoch, offered, table, timeout_s=timeout_s
        )
        logger.info("peer reached peer=%s transport=%s", self.name, transport.name)
        return PeerConnection(own_epoch, transport, peer, welcome.arena.region_id, welcome.slot_bytes)

    def _forget(self, reached: PeerConnection) -> None:
        with self._hello_lock:
            if self._reached is reached:
                self._reached = None

    def _asked(self, message: Message, timeout_s: float, attempts: int) -> Message:
        with self._lock:
            if self._is_closed:
                raise InstanceLost(self.name, "it was given up")
            link = self._idle.pop() if self._idle else self._connect(self.address.control)
        try:
            for attempt in range(attempts):
                try:
                    return link.request(message, timeout_s=timeout_s)
                except InstanceLost:
                    if attempt == attempts - 1:
                        raise
            raise AssertionError("unreachable")
        finally:
            with self._lock:
                if not self._is_closed:
                    self._idle.append(link)
                    link = None  # type: ignore[assignment]
            if link is not None:
                link.close()
