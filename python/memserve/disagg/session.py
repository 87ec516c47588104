"""One peer of a transfer engine: how it is named, what is known of it, and how bytes reach it.

    prefill                         decode
    first use:   Open(epoch)     →
                                 ←  Opened(epoch, endpoints, regions)
    every use:   addresses → (region, offset), then the picked transport writes

Knows no SGLang and no blocks.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

from memserve.core.cluster_key import ClusterKey
from memserve.core.errors import (
    BadRequest,
    InstanceLost,
    MemServeError,
    OutOfBounds,
    StaleEpoch,
    TransferFailed,
    TransferTimeout,
    WireMismatch,
)
from memserve.core.ids import Epoch
from memserve.transport.base import Peer, Transport
from memserve.transport.copies import Copies
from memserve.transport.regions import AddressMap, Int64s, Region, RegionTable
from memserve.transport.registry import connect_best
from memserve.wire.link import ControlClient
from memserve.wire.messages import Open, Opened

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SessionId:
    """One life of one engine: `host:port:epoch` as ASCII text, an IPv6 host in brackets.

    The epoch is decimal: SGLang's connector reads the last part as a number, to spread sessions.
    """

    control_address: str
    """`host:port` of its control server."""
    epoch: Epoch

    @classmethod
    def parse(cls, text: str) -> SessionId:
        """Raises BadRequest if `text` is none."""
        address, _, epoch = text.rpartition(":")
        host, _, port = address.rpartition(":")
        try:
            if not host or not 0 < int(port) < 65536:
                raise ValueError
            return cls(address, Epoch(int(epoch)))
        except ValueError as error:
            raise BadRequest(f"not a session id: {text!r}") from error

    def __str__(self) -> str:
        return f"{self.control_address}:{self.epoch}"


@dataclass(frozen=True, slots=True)
class _PeerRegions:
    """What is known of the peer at a moment."""

    peer: Peer
    transport: Transport
    memory: AddressMap


class HandoffSession:
    """Transfers to one life of one peer. Any thread."""

    def __init__(
        self, session_id: SessionId, own: Sequence[Transport], key: ClusterKey | None, timeout_s: float
    ) -> None:
        """Nothing is sent before the first use. `timeout_s` bounds each step of a transfer."""
        self.session_id = session_id
        self._own = own
        self._key = key
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._reached: _PeerRegions | None = None

    @property
    def transport_name(self) -> str:
        """The transport in use; empty before the first use."""
        reached = self._reached
        return reached.transport.name if reached is not None else ""

    def write(self, local: tuple[Int64s, Int64s], addresses: Int64s, lengths: Int64s) -> None:
        """Copy ranges of local regions (ids, offsets) over the peer's bytes at `addresses`.

        When it raises, no byte lands any more, unless it raises TransferTimeout.
        """
        reached = self._reached or self._refresh(None)
        try:
            self._write(reached, local, addresses, lengths)
        except OutOfBounds:
            # The peer may have registered memory, or done so anew, since we asked.
            self._write(self._refresh(reached), local, addresses, lengths)

    def probe(self) -> None:
        """Ask the peer whether it lives and can be reached. Errors as of a transfer."""
        reached = self._refresh(self._reached)
        reached.transport.connect(reached.peer, timeout_s=self._timeout_s)

    def close(self) -> None:
        """Let go of the peer. Running transfers end as they would."""
        with self._lock:
            if self._reached is not None:
                self._reached.transport.disconnect(self._reached.peer)

    def _write(
        self, reached: _PeerRegions, local: tuple[Int64s, Int64s], addresses: Int64s, lengths: Int64s
    ) -> None:
        remote = reached.memory.locate(addresses, lengths)
        copies = Copies(*local, *remote, lengths)
        try:
            reached.transport.write(reached.peer, copies, timeout_s=self._timeout_s)
        except (TransferTimeout, TransferFailed, InstanceLost) as error:
            self._settle(reached, error)
            raise

    def _settle(self, reached: _PeerRegions, cause: MemServeError) -> None:
        """See to it that nothing lands late; the peer's memory may be given away after our error."""
        try:
            reached.transport.settle(reached.peer, timeout_s=self._timeout_s)
        except (InstanceLost, StaleEpoch):
            return
        except MemServeError as error:
            logger.warning("bytes may still land at peer=%s after: %s (%s)", self.session_id, cause, error)
            raise TransferTimeout(str(self.session_id), self._timeout_s) from cause

    def _refresh(self, seen: _PeerRegions | None) -> _PeerRegions:
        """Ask the peer anew, unless another thread has done so since `seen`."""
        with self._lock:
            if self._reached is not None and self._reached is not seen:
                return self._reached
            opened = self._ask()
            regions = [Region(item.region_id, item.address, item.num_bytes) for item in opened.regions]
            table = RegionTable()
            for region in regions:
                table.add(region)
            memory = AddressMap(regions)
            offered = {endpoint.transport: endpoint.address for endpoint in opened.endpoints}
            if self._reached is None:
                transport, peer = connect_best(
                    self._own, str(self.session_id), opened.epoch, offered, table, timeout_s=self._timeout_s
                )
                logger.info("transfer session opened peer=%s transport=%s", peer.name, transport.name)
            else:
                transport = self._reached.transport
                peer = Peer(str(self.session_id), opened.epoch, offered[transport.name], table)
            self._reached = _PeerRegions(peer, transport, memory)
            return self._reached

    def _ask(self) -> Opened:
        name = str(self.session_id)
        with closing(ControlClient(self.session_id.control_address, key=self._key)) as client:
            answer = client.request(Open(self.session_id.epoch), timeout_s=self._timeout_s)
        if not isinstance(answer, Opened):
            raise WireMismatch(f"{name} did not say how its memory is reached: {answer}")
        if answer.epoch != self.session_id.epoch:
            raise StaleEpoch(name, self.session_id.epoch, answer.epoch)
        return answer
