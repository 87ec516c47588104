"""One life of another process as this one reaches it: handshake, control messages, and its memory.

    first use:   Hello(data epoch, layout?) → Welcome(transports, regions); then the best transport connects
    is_fenced:   this process's transports begin a new data epoch, and Hello again
    Unknown, a region or a data epoch that is over:   Hello again, once

Knows no purpose: the pool's `Sender` and `Reader`, and the handoff, say what is asked and copied.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

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
from memserve.core.kv_layout import KVLayout
from memserve.peering.local_regions import HandshakeRequired, LocalRegions, Served
from memserve.transport.base import Peer, Transport
from memserve.transport.regions import AddressMap, Region, RegionTable
from memserve.transport.registry import connect_best
from memserve.wire.link import ControlLink
from memserve.wire.messages import Message, Refused, Unknown
from memserve.wire.peer_messages import Declined, Hello, MemoryRange, TransportAddress, Welcome

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class PeerAddress(NamedTuple):
    """One life of another process."""

    control: str
    """`host:port` of its control server."""
    epoch: Epoch

    def __str__(self) -> str:
        return f"{self.control}:{self.epoch:016x}"


Connect = Callable[[str], ControlLink]


class OwnSide(NamedTuple):
    """This process as the initiator of exchanges: the pool has one, the handoff another."""

    epoch: Epoch
    regions: LocalRegions
    connect: Connect
    """Makes a control link to `host:port`."""
    timeout_s: float
    """Bounds each step of an exchange."""
    max_links: int = 64
    """Control links that are kept between two uses, per peer."""


@dataclass(frozen=True, slots=True)
class PeerConnection:
    """The peer's memory as the transports of one of our data epochs reach it."""

    own_epoch: Epoch
    transport: Transport
    peer: Peer
    memory: AddressMap
    """The peer's regions."""
    slot_bytes: int
    """Of its arena; 0 without a layout."""


class RemoteProcess:
    """Any thread may call any method; requests of several threads do not wait for each other."""

    def __init__(
        self, address: PeerAddress, own: OwnSide, *, layout: KVLayout | None = None, name: str = ""
    ) -> None:
        """Nothing is sent before the first use. `layout`: as in `Hello`; `name`: for errors and logs."""
        self.address = address
        self.name = name or str(address)
        self.epoch = own.epoch
        self.regions = own.regions
        self.timeout_s = own.timeout_s
        self._own = own
        self._layout = layout
        self._lock = threading.Lock()
        self._hello_lock = threading.Lock()
        self._connection: PeerConnection | None = None
        self._last_connection: PeerConnection | None = None
        self._idle: list[ControlLink] = []
        self._is_closed = False

    def exchange(self, action: Callable[[PeerConnection], Result]) -> Result:
        """Run `action` on the peer's memory, which stays reachable meanwhile; once more after a new Hello.

        Raises what `action` raises, after which the next use begins with a handshake; StaleEpoch if
        another process is at the address, PeerDeclined if the two cannot agree.
        """
        for is_last in (False, True):
            connection = self.connection()
            try:
                with self.regions.hold(connection.own_epoch):
                    return action(connection)
            except PeerDeclined:
                raise
            except (HandshakeRequired, OutOfBounds, StaleEpoch) as error:
                self._forget(connection)
                if is_last:
                    if isinstance(error, HandshakeRequired):
                        raise PeerDeclined(self.name, str(error)) from error
                    raise
            except MemServeError:
                self._forget(connection)
                raise
        raise AssertionError("unreachable")

    def ask(self, message: Message, *, timeout_s: float | None = None, attempts: int = 2) -> Message:
        """The peer's answer. Asks again if it is lost: all messages are idempotent.

        Raises InstanceLost, WireMismatch, or HandshakeRequired if the peer does not know this process.
        """
        answer = self._asked(message, self.timeout_s if timeout_s is None else timeout_s, attempts)
        if isinstance(answer, Unknown):
            raise HandshakeRequired(f"{self.name} does not know epoch {self.epoch:016x}")
        if isinstance(answer, Refused):
            raise WireMismatch(f"{self.name} refused {type(message).__name__}: {answer.reason}")
        return answer

    def connection(self) -> PeerConnection:
        """The way to the peer's memory, after a handshake if there was none.

        Raises StaleEpoch, LayoutMismatch, PeerDeclined, InstanceLost, TransferFailed.
        """
        connection = self._connection
        if connection is not None:
            return connection
        with self._hello_lock:
            if self._connection is None:
                self._connection = self._last_connection = self._handshake()
            return self._connection

    def probe(self) -> None:
        """Repeat the handshake and connect. Errors as of `connection`."""
        connection = self._connection
        if connection is not None:
            self._forget(connection)
        self.connection()

    def close(self) -> None:
        """Disconnect from the peer; running requests and copies end as they would."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
            connection, self._connection = self._last_connection, None
        for link in idle:
            link.close()
        if connection is not None:
            connection.transport.disconnect(connection.peer)

    def _handshake(self) -> PeerConnection:
        for _ in range(2):
            served = self.regions.served()
            hello = Hello(self.epoch, self.address.epoch, served.epoch, self._layout)
            answer = self._asked(hello, self.timeout_s, 2)
            if isinstance(answer, Refused) and self._layout is not None:
                raise LayoutMismatch(f"{self.name}: {answer.reason}")
            if isinstance(answer, Declined):
                raise PeerDeclined(self.name, answer.reason)
            if not isinstance(answer, Welcome):
                raise WireMismatch(f"{self.name} did not say how its memory is reached: {answer}")
            if answer.epoch != self.address.epoch:
                raise StaleEpoch(self.name, self.address.epoch, answer.epoch)
            if not answer.is_fenced:
                return self._connected(answer, served)
            self.regions.reopen(served.epoch)
        raise TransferFailed(self.name, "it has fenced this process")

    def _connected(self, welcome: Welcome, own: Served) -> PeerConnection:
        table = RegionTable()
        regions = [Region(one.region_id, one.address, one.num_bytes) for one in welcome.regions]
        for region in regions:
            table.add(region)
        offered = {endpoint.transport: endpoint.address for endpoint in welcome.endpoints}
        transport, peer = connect_best(
            own.transports, self.name, welcome.data_epoch, offered, table, timeout_s=self.timeout_s
        )
        last = self._last_connection
        if last is None or (last.transport.name, last.peer) != (transport.name, peer):
            logger.info("peer reached peer=%s transport=%s", self.name, transport.name)
        return PeerConnection(own.epoch, transport, peer, AddressMap(regions), welcome.slot_bytes)

    def _forget(self, connection: PeerConnection) -> None:
        with self._hello_lock:
            if self._connection is connection:
                self._connection = None

    def _asked(self, message: Message, timeout_s: float, attempts: int) -> Message:
        with self._lock:
            if self._is_closed:
                raise InstanceLost(self.name, "it was given up")
            link = self._idle.pop() if self._idle else self._own.connect(self.address.control)
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
                is_kept = not self._is_closed and len(self._idle) < self._own.max_links
                if is_kept:
                    self._idle.append(link)
            if not is_kept:
                link.close()


def welcome_of(epoch: Epoch, own: Served, regions: tuple[Region, ...], slot_bytes: int = 0) -> Welcome:
    """The answer to a Hello: how `regions` of the process of this epoch are reached."""
    endpoints = tuple(TransportAddress(one.name, one.address) for one in own.transports)
    ranges = tuple(MemoryRange(one.region_id, one.address, one.num_bytes) for one in regions)
    return Welcome(epoch, own.epoch, endpoints, ranges, slot_bytes)
