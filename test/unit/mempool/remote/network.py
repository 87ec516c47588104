"""A network of transports in one process, whose bytes arrive when a test says so, or twisted, or never."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from memserve.core.errors import InstanceLost, StaleEpoch, TransferFailed, TransferTimeout
from memserve.core.ids import Epoch
from memserve.transport.base import Peer, Transport
from memserve.transport.copies import Copies
from memserve.transport.regions import Region, RegionTable


class Mishap(StrEnum):
    """What happens to the bytes of one copy."""

    NONE = "none"
    FAIL = "fail"
    """Some of them land, and it is over."""
    LATE = "late"
    """It times out, and they land later, unless somebody sees to it that they do not."""
    TWIST = "twist"
    """One bit of the last byte arrives wrong."""


@dataclass(eq=False)
class LateCopy:
    """Bytes under way, of a copy whose initiator has given up."""

    initiator: MemoryTransport
    owner: MemoryTransport
    into: MemoryTransport
    moves: list[tuple[int, bytes]]


class Network:
    """All transports by address."""

    def __init__(self) -> None:
        self.transports: dict[str, MemoryTransport] = {}
        self.mishaps: deque[Mishap] = deque()
        self.late: list[LateCopy] = []
        self.can_settle = True
        """Whether initiators can call late bytes back."""
        self.can_fence = True
        """Whether owners can be sure to keep late bytes out."""
        self._num_opened = 0

    def opener(self, name: str) -> Callable[[Epoch], Sequence[Transport]]:
        """Opens the transports of one process."""

        def opened(epoch: Epoch) -> Sequence[Transport]:
            self._num_opened += 1
            transport = MemoryTransport(self, epoch, f"{name}#{self._num_opened}")
            self.transports[transport.address] = transport
            return (transport,)

        return opened

    def land(self, pick: int) -> None:
        """Let one late copy arrive."""
        copy = self.late.pop(pick % len(self.late))
        for address, data in copy.moves:
            ctypes.memmove(address, data, len(data))


class MemoryTransport(Transport):
    """See `Network`."""

    name = "tcp"

    def __init__(self, network: Network, epoch: Epoch, address: str) -> None:
        self._network = network
        self._epoch = epoch
        self._address = address
        self._regions = RegionTable()
        self._fenced: set[Epoch] = set()
        self._is_closed = False

    @property
    def address(self) -> str:
        return self._address

    def register(self, region: Region) -> None:
        self._regions.add(region)

    def deregister(self, region_id: int, *, timeout_s: float) -> None:
        self._regions.remove(region_id)

    def connect(self, peer: Peer, *, timeout_s: float) -> None:
        self._owner(peer)

    def disconnect(self, peer: Peer) -> None:
        pass

    def write(self, peer: Peer, copies: Copies, *, timeout_s: float) -> None:
        self._move(peer, copies, is_write=True)

    def read(self, peer: Peer, copies: Copies, *, timeout_s: float) -> None:
        self._move(peer, copies, is_write=False)

    def settle(self, peer: Peer, *, timeout_s: float) -> None:
        quarantined_reads = [copy for copy in self._network.late if copy.initiator is self]
        if quarantined_reads and not self._network.can_settle:
            raise TransferTimeout(peer.name, timeout_s)
        self._drop(lambda copy: copy.initiator is self and copy.owner.address == peer.address)

    def fence(self, epoch: Epoch, *, timeout_s: float) -> None:
        self._fenced.add(epoch)
        if not self._network.can_fence:
            raise TransferTimeout("a peer", timeout_s)
        self._drop(lambda copy: copy.into is self and copy.initiator._epoch == epoch)

    def close(self) -> None:
        self._is_closed = True
        self._drop(lambda copy: self in (copy.owner, copy.initiator) and self is copy.into)
        self._drop(lambda copy: self is copy.initiator)

    def _owner(self, peer: Peer) -> MemoryTransport:
        if self._is_closed:
            raise TransferFailed(peer.name, "closed")
        owner = self._network.transports.get(peer.address)
        if owner is None or owner._is_closed:
            raise InstanceLost(peer.name, "nobody is there")
        if owner._epoch != peer.epoch:
            raise StaleEpoch(peer.name, peer.epoch, owner._epoch)
        if self._epoch in owner._fenced:
            raise TransferFailed(peer.name, "it has fenced this process")
        return owner

    def _move(self, peer: Peer, copies: Copies, *, is_write: bool) -> None:
        owner = self._owner(peer)
        lengths = copies.num_bytes
        here = self._regions.resolve(copies.local_regions, copies.local_offsets, lengths)
        there = owner._regions.resolve(copies.remote_regions, copies.remote_offsets, lengths)
        source, target = (here, there) if is_write else (there, here)
        moves = [
            (int(to), ctypes.string_at(int(at), int(length)))
            for at, to, length in np.stack([source, target, lengths]).T
        ]
        mishap = self._network.mishaps.popleft() if self._network.mishaps else Mishap.NONE
        if mishap is Mishap.LATE:
            self._network.late.append(LateCopy(self, owner, owner if is_write else self, moves))
            raise TransferTimeout(peer.name, 0.0)
        if mishap is Mishap.TWIST:
            address, data = moves[-1]
            moves[-1] = (address, data[:-1] + bytes([data[-1] ^ 1]))
        if mishap is Mishap.FAIL:
            moves = moves[: len(moves) // 2]
        for address, data in moves:
            ctypes.memmove(address, data, len(data))
        if mishap is Mishap.FAIL:
            raise TransferFailed(peer.name, "some bytes landed")

    def _drop(self, is_dropped: Callable[[LateCopy], bool]) -> None:
        self._network.late = [copy for copy in self._network.late if not is_dropped(copy)]
