"""The contract of every transport: bytes between registered regions of two processes, nothing more.

    owner of the memory                      initiator
    register(region)
    address ---- (control plane) ---->  Peer(name, epoch, address)
                                        write / read: returns when the bytes are in place
                                        settle: after a timeout, makes sure that no byte lands late
    fence(epoch): refuses one data
    epoch of one process for good

Knows no blocks, no control messages, and not how a peer is found.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

from memserve.core.ids import Epoch
from memserve.transport.copies import Copies
from memserve.transport.regions import Region, RegionTable


@dataclass(frozen=True, slots=True)
class Peer:
    """One life of another process, as one transport reaches it. Compared by epoch and address."""

    name: str = field(compare=False)
    """Its name in errors and logs."""
    epoch: Epoch
    address: str
    """The peer's `Transport.address`, for a transport of the same name."""
    regions: RegionTable = field(compare=False)
    """The peer's regions as of the handshake; a transport that can ask the peer for them does."""


class Transport(ABC):
    """Moves bytes between this process's regions and its peers'. Any thread may call anything.

    Errors that every copy can raise, and the state of the destination after them:
    OutOfBounds      a range outside a region, at either end: no byte has moved
    StaleEpoch       another process is at the address, or the peer has fenced this one: no byte has moved
    InstanceLost     the peer is gone, or was never there: undefined, and without an owner
    TransferFailed   this transport cannot do it: undefined
    TransferTimeout  undefined, and bytes may still land there until `settle` has returned
    """

    name: ClassVar[str]

    @property
    @abstractmethod
    def address(self) -> str:
        """Where peers reach this process's regions: the text of a `TransportAddress` on the wire."""

    @abstractmethod
    def register(self, region: Region) -> None:
        """Let peers read and write `region`, and copies name it as their local end.

        The caller keeps the bytes mapped until `deregister` has returned.
        Raises OutOfBounds if the id is taken or the region is no range of memory.
        """

    @abstractmethod
    def deregister(self, region_id: int, *, timeout_s: float) -> None:
        """Stop serving a region; after it returns, no peer's bytes land there.

        Raises OutOfBounds if it is not registered, TransferTimeout if a peer is still copying: the
        region is out of the table, but its memory is not free yet.
        """

    @abstractmethod
    def connect(self, peer: Peer, *, timeout_s: float) -> None:
        """Check that `peer` can be reached; the first copy is faster after it. Errors as of a copy."""

    @abstractmethod
    def disconnect(self, peer: Peer) -> None:
        """Release the connections to `peer`; running copies end as they would. Never raises."""

    @abstractmethod
    def write(self, peer: Peer, copies: Copies, *, timeout_s: float) -> None:
        """Copy local bytes into `peer`'s regions; returns when they are in its memory."""

    @abstractmethod
    def read(self, peer: Peer, copies: Copies, *, timeout_s: float) -> None:
        """Copy bytes of `peer`'s regions into local ones; returns when they are in place."""

    @abstractmethod
    def settle(self, peer: Peer, *, timeout_s: float) -> None:
        """Return when no byte of this process's failed copies with `peer` can land any more.

        Immediate if no copy has failed. Raises TransferTimeout if that cannot be assured: the memory
        stays in quarantine until the peer is known to be dead. Raises InstanceLost or StaleEpoch if it
        is dead: the memory at its end has no owner.
        """

    @abstractmethod
    def fence(self, epoch: Epoch, *, timeout_s: float) -> None:
        """Refuse the process of this epoch for good; after this returns, none of its bytes land here.

        Raises TransferTimeout if that process may still be copying (it is refused all the same),
        TransferFailed if this transport cannot refuse a process.
        """

    @abstractmethod
    def close(self) -> None:
        """Stop serving peers and disconnect from them; running copies end with an error. Idempotent."""
