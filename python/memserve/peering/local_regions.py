"""Memory of this process as its transports serve it, and the life of those transports: the data epoch.

    data epoch A:  transports, regions  --- a peer has fenced A --->  data epoch B: all of it anew

A thread that copies bytes holds the data epoch it began with, so that no transport closes under it.
Knows no control messages.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from memserve.core.errors import MemServeError, OutOfBounds, Retryable, TransferTimeout
from memserve.core.ids import Epoch, new_epoch
from memserve.transport.base import Transport
from memserve.transport.regions import AddressMap, Region, RegionTable

logger = logging.getLogger(__name__)

OpenTransports = Callable[[Epoch], Sequence[Transport]]
"""The transports of a data epoch, best first."""


class HandshakeRequired(Retryable):
    """The two processes' knowledge of each other's memory is out of date: repeat the handshake."""


class Served(NamedTuple):
    """How this process's memory can be reached at one moment."""

    epoch: Epoch
    transports: tuple[Transport, ...]


class LocalRegions:
    """Transports and the regions they serve. Any thread may call any method."""

    def __init__(self, open_transports: OpenTransports, epoch: Epoch, timeout_s: float) -> None:
        """`timeout_s` bounds each wait for a peer. Raises what `open_transports` raises."""
        self._open = open_transports
        self._timeout_s = timeout_s
        self._changed = threading.Condition()
        self._num_users = 0
        self._is_reopening = False
        self._ids = RegionTable()
        self.addresses = AddressMap([])
        """All registered regions; replaced by another map at each change."""
        self.epoch = epoch
        """Data epoch of the open transports; 0 after `close`."""
        self.transports = tuple(open_transports(epoch))
        self.num_reopened = 0

    def served(self) -> Served:
        """The data epoch and its transports, of one moment."""
        with self._changed:
            return Served(self.epoch, self.transports)

    def add(self, address: int, num_bytes: int) -> Region:
        """Let peers reach `num_bytes` bytes at `address`.

        Raises OutOfBounds, changing nothing, if that is no memory or overlaps a registered region.
        """
        with self._changed:
            if self.addresses.overlaps(address, num_bytes):
                raise OutOfBounds(f"{num_bytes} bytes at {address:#x} overlap registered memory")
            region = Region(self._ids.next_id(), address, num_bytes)
            self._ids.add(region)
            for transport in self.transports:
                transport.register(region)
            self.addresses = AddressMap([*self.addresses.regions, region])
            return region

    def remove(self, region: Region) -> None:
        """Take a region back; after this returns, no byte of a peer lands there.

        Raises TransferTimeout if a peer is still copying: the region is out of the table, but its
        memory is not free yet.
        """
        late: MemServeError | None = None
        with self._changed:
            self.addresses = AddressMap([kept for kept in self.addresses.regions if kept != region])
            self._ids.remove(region.region_id)
            for transport in self.transports:
                try:
                    transport.deregister(region.region_id, timeout_s=self._timeout_s)
                except TransferTimeout as error:
                    late = error
        if late is not None:
            raise late

    @contextmanager
    def hold(self, epoch: Epoch) -> Iterator[None]:
        """Keep the transports of that data epoch open. Raises HandshakeRequired if they are closed."""
        with self._changed:
            if self._is_reopening or self.epoch != epoch:
                raise HandshakeRequired(f"data epoch {epoch:016x} is over")
            self._num_users += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_users -= 1
                self._changed.notify_all()

    def reopen(self, seen: Epoch) -> bool:
        """End the data epoch `seen` and begin another; False if another thread has done so.

        Waits for the threads that hold it. Raises TransferTimeout, changing nothing, if they take too long.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: not self._is_reopening, self._timeout_s):
                raise TransferTimeout("another thread's reopening", self._timeout_s)
            if self.epoch != seen:
                return False
            self._is_reopening = True
            try:
                if not self._changed.wait_for(lambda: self._num_users == 0, self._timeout_s):
                    raise TransferTimeout("running copies", self._timeout_s)
                for transport in self.transports:
                    transport.close()
                self.epoch = new_epoch()
                self.num_reopened += 1
                self.transports = tuple(self._open(self.epoch))
                for region in self.addresses.regions:
                    for transport in self.transports:
                        transport.register(region)
            finally:
                self._is_reopening = False
                self._changed.notify_all()
        logger.warning("fenced by a peer, transports opened anew data_epoch=%016x", self.epoch)
        return True

    def fence(self, epoch: Epoch) -> None:
        """Refuse that data epoch of a peer on all transports. Errors as of `Transport.fence`."""
        for transport in self.transports:
            transport.fence(epoch, timeout_s=self._timeout_s)

    def close(self) -> None:
        """Stop serving. Idempotent."""
        with self._changed:
            self.epoch = Epoch(0)
        for transport in self.transports:
            transport.close()
