"""The drop-in for SGLang's MooncakeTransferEngine: its interface over our transports.

SGLang's connector passes absolute addresses of the two processes and a session id that the receiver
has told the sender; here they become regions, offsets and a peer. Return values are Mooncake's: 0,
or a negative number; `register` and `deregister` raise RuntimeError instead.

    prefill                         decode
    Hello(no layout)             →                        once, and after a region is not found
                                 ←  Welcome(transports, regions)
    addresses → (region, offset), then the best transport writes

Knows no SGLang and no blocks: `engine` gives it the constructor that SGLang calls.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from memserve.core.errors import (
    BadRequest,
    InstanceLost,
    MemServeError,
    OutOfBounds,
    StaleEpoch,
    TransferFailed,
    TransferTimeout,
)
from memserve.core.ids import Epoch
from memserve.peering.endpoint import TransferEndpoint
from memserve.peering.local_regions import LocalRegions
from memserve.peering.remote_process import OwnSide, PeerAddress, PeerConnection, RemoteProcess
from memserve.transport.copies import Copies
from memserve.transport.regions import Int64s, Region
from memserve.transport.registry import TransportConfig, open_transports

logger = logging.getLogger(__name__)

_FAILED = -1


def session_id(address: PeerAddress) -> str:
    """`host:port:epoch` as ASCII text, an IPv6 host in brackets: names one life of one engine.

    The epoch is decimal: SGLang's connector reads the last part as a number, to spread sessions.
    """
    return f"{address.control}:{address.epoch}"


def parse_session_id(text: str) -> PeerAddress:
    """The inverse of `session_id`. Raises BadRequest if `text` is no session id."""
    address, _, epoch = text.rpartition(":")
    host, _, port = address.rpartition(":")
    try:
        if not host or not 0 < int(port) < 65536:
            raise ValueError
        return PeerAddress(address, Epoch(int(epoch)))
    except ValueError as error:
        raise BadRequest(f"not a session id: {text!r}") from error


@dataclass(frozen=True, slots=True)
class Traffic:
    """What was written: calls that succeeded, copies in them, bytes; and calls that failed."""

    num_transfers: int = 0
    num_copies: int = 0
    num_bytes: int = 0
    num_failures: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.num_transfers + other.num_transfers,
            self.num_copies + other.num_copies,
            self.num_bytes + other.num_bytes,
            self.num_failures + other.num_failures,
        )


@dataclass(frozen=True, slots=True)
class TransferStats:
    """A snapshot of an engine's traffic since it started, in all and by session id."""

    total: Traffic = Traffic()
    sessions: dict[str, Traffic] = field(default_factory=dict)


class TransferEngine:
    """One process's end of every KV transfer. Any thread may call any method; calls block."""

    def __init__(self, endpoint: TransferEndpoint, config: TransportConfig, timeout_s: float = 30.0) -> None:
        """Open the transports and have the endpoint tell peers of them. `close` closes the endpoint.

        Raises ConfigError if a transport cannot be opened.
        """
        self._endpoint = endpoint
        self._config = config
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        opened = partial(open_transports, config, endpoint.key)
        self._regions = LocalRegions(opened, endpoint.epoch, timeout_s)
        self._own = OwnSide(endpoint.epoch, self._regions, endpoint.connect, timeout_s, max_links=0)
        self._sessions: dict[str, RemoteProcess] = {}
        self._stats = TransferStats()
        self._session_id = session_id(endpoint.address)
        endpoint.serve_handoff(self._regions)
        offered = ",".join(transport.name for transport in self._regions.transports)
        logger.info("transfer engine ready session=%s transports=%s", self._session_id, offered)

    def register(self, ptr: int, length: int) -> None:
        """Let peers reach `length` bytes at `ptr`, and transfers start from them.

        Raises RuntimeError if that is no memory, or overlaps what is registered.
        """
        if self.batch_register([ptr], [length]) != 0:
            raise RuntimeError(f"memory registration failed: {length} bytes at {ptr:#x}")

    def deregister(self, ptr: int) -> None:
        """Take the registered memory at `ptr` back; nothing lands there any more.

        Raises RuntimeError if nothing is registered there, or a peer is still copying.
        """
        if self.batch_deregister([ptr]) != 0:
            raise RuntimeError(f"memory deregistration failed: {ptr:#x}")

    def batch_register(self, ptrs: Sequence[int], lengths: Sequence[int]) -> int:
        """As `register` for several ranges, all or none; 0 or negative."""
        added: list[Region] = []
        try:
            for ptr, length in zip(ptrs, lengths, strict=True):
                added.append(self._regions.add(int(ptr), int(length)))
        except (MemServeError, ValueError) as error:
            logger.warning("memory not registered ranges=%d: %s", len(ptrs), error)
            for region in added:
                self._regions.remove(region)
            return _FAILED
        return 0

    def batch_deregister(self, ptrs: Sequence[int]) -> int:
        """As `deregister` for several ranges; 0, or negative if any of them failed."""
        result = 0
        for ptr in ptrs:
            region = self._regions.addresses.at(int(ptr))
            try:
                if region is None:
                    raise OutOfBounds(f"nothing is registered at {int(ptr):#x}")
                self._regions.remove(region)
            except MemServeError as error:
                logger.warning("memory not deregistered: %s", error)
                result = _FAILED
        return result

    def transfer_sync(self, session_id: str, buffer: int, peer_buffer_address: int, length: int) -> int:
        """Write `length` bytes from `buffer` to the peer's `peer_buffer_address`; 0 or negative."""
        return self.batch_transfer_sync(session_id, [buffer], [peer_buffer_address], [length])

    def batch_transfer_sync(
        self,
        session_id: str,
        buffers: Sequence[int],
        peer_buffer_addresses: Sequence[int],
        lengths: Sequence[int],
    ) -> int:
        """Write several ranges; 0 when all are in the peer's memory.

        Negative if not, with the reason in the log: what has landed is undefined, but nothing lands
        after the return unless the log says that it may.
        """
        done = Traffic(num_failures=1)
        try:
            own, theirs, sizes = _columns(buffers, peer_buffer_addresses, lengths)
            local = self._regions.addresses.locate(own, sizes)
            self._session(session_id).exchange(
                lambda connection: self._write(connection, local, theirs, sizes)
            )
            done = Traffic(1, len(sizes), int(sizes.sum()))
            return 0
        except MemServeError as error:
            logger.warning("transfer failed peer=%s copies=%d: %s", session_id, len(lengths), error)
            if isinstance(error, StaleEpoch | InstanceLost):
                self._forget(session_id)
            return _FAILED
        finally:
            self._count(session_id, done)

    def get_session_id(self) -> str:
        """What a peer passes to write into this process: `host:port:epoch`."""
        return self._session_id

    def send_probe(self, peer_session_id: str) -> int:
        """0 if that life of the peer can be written to now, else negative."""
        try:
            self._session(peer_session_id).probe()
        except MemServeError as error:
            logger.debug("probe failed peer=%s: %s", peer_session_id, error)
            self._forget(peer_session_id)
            return _FAILED
        return 0

    def get_ib_device(self) -> str:
        """The RDMA devices that were asked for; empty if none."""
        return self._config.ib_device

    def stats(self) -> TransferStats:
        """The traffic of this engine so far."""
        with self._lock:
            return TransferStats(self._stats.total, dict(self._stats.sessions))

    def close(self) -> None:
        """Answer no peer any more and release all memory. Idempotent."""
        self._endpoint.close()
        with self._lock:
            sessions, self._sessions = self._sessions, {}
        for session in sessions.values():
            session.close()
        self._regions.close()

    def _write(
        self, connection: PeerConnection, local: tuple[Int64s, Int64s], addresses: Int64s, lengths: Int64s
    ) -> None:
        """Copy ranges of local regions (ids, offsets) over the peer's bytes at `addresses`.

        After an error no byte lands any more, unless the error is TransferTimeout.
        """
        copies = Copies(*local, *connection.memory.locate(addresses, lengths), lengths)
        transport, peer = connection.transport, connection.peer
        try:
            transport.write(peer, copies, timeout_s=self._timeout_s)
        except (TransferTimeout, TransferFailed, InstanceLost) as cause:
            # SGLang may give the peer's memory to another request as soon as this call has failed.
            try:
                transport.settle(peer, timeout_s=self._timeout_s)
            except (InstanceLost, StaleEpoch):
                raise cause from None
            except MemServeError as error:
                logger.warning("bytes may still land at peer=%s after: %s (%s)", peer.name, cause, error)
                raise TransferTimeout(peer.name, self._timeout_s) from cause
            raise

    def _session(self, text: str) -> RemoteProcess:
        session = self._sessions.get(text)
        if session is None:
            made = RemoteProcess(parse_session_id(text), self._own, name=text)
            with self._lock:
                session = self._sessions.setdefault(text, made)
        return session

    def _forget(self, text: str) -> None:
        """Close the session of a peer that is gone; if it is there after all, the next use opens another."""
        with self._lock:
            session = self._sessions.pop(text, None)
        if session is not None:
            session.close()

    def _count(self, text: str, traffic: Traffic) -> None:
        with self._lock:
            sessions = self._stats.sessions
            sessions[text] = sessions.get(text, Traffic()) + traffic
            self._stats = TransferStats(self._stats.total + traffic, sessions)


def _columns(*columns: Sequence[int]) -> tuple[Int64s, ...]:
    """The arguments of a transfer as arrays of one length. Raises OutOfBounds if they are not."""
    try:
        arrays = tuple(np.array(column, np.int64) for column in columns)
    except (TypeError, ValueError, OverflowError) as error:
        raise OutOfBounds(f"not addresses and lengths: {error}") from error
    if len({array.shape for array in arrays}) != 1 or arrays[0].ndim != 1:
        raise OutOfBounds(f"lists of different lengths: {[len(column) for column in columns]}")
    return arrays
