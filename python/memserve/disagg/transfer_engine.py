"""The drop-in for SGLang's MooncakeTransferEngine: its interface over our transports.

SGLang's connector speaks of absolute addresses of the two processes and of a session id that the
receiver has told the sender; here they become regions, offsets and a peer. Return values are
Mooncake's: 0, or a negative number; `register` and `deregister` raise RuntimeError instead.

    control: Open → Opened      (session.py)
    data:    write              (transport/)

Knows no SGLang: `engine` gives it the constructor that SGLang calls.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from memserve.core.cluster_key import ClusterKey
from memserve.core.errors import ConfigError, InstanceLost, MemServeError, OutOfBounds, StaleEpoch
from memserve.core.ids import new_epoch
from memserve.disagg.session import HandoffSession, SessionId
from memserve.transport.regions import AddressMap, Int64s, Region, RegionTable
from memserve.transport.registry import MooncakeProtocol, TransportConfig, TransportName, open_transports
from memserve.wire.link import ControlServer
from memserve.wire.messages import Message, Open, Opened, Refused
from memserve.wire.peer_messages import Endpoint, MemoryRange

logger = logging.getLogger(__name__)

_FAILED = -1


@dataclass(frozen=True, slots=True)
class TransferConfig:
    """How this process moves KV. Without a cluster key everything stays on this host."""

    transport: TransportName = "auto"
    host: str = "127.0.0.1"
    """Address to listen on, which peers are told."""
    control_port: int = 0
    """0: the system picks one, as for `data_port`."""
    data_port: int = 0
    cluster_key_file: Path | None = None
    timeout_s: float = 30.0
    mooncake_protocol: MooncakeProtocol = "rdma"
    ib_device: str = ""
    """RDMA devices for mooncake, comma-separated; empty: all."""

    def __post_init__(self) -> None:
        if self.timeout_s <= 0:
            raise ConfigError(f"the transfer timeout is {self.timeout_s:g} s; it must be above 0")
        if self.host in ("", "0.0.0.0", "::", "[::]", "*"):
            raise ConfigError(f"peers cannot reach {self.host!r}: name the address they should use")


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
    """One process's end of every KV transfer. Any thread may call anything; calls block."""

    def __init__(self, config: TransferConfig) -> None:
        """Open the transports and answer peers. Raises ConfigError if that cannot be."""
        key = ClusterKey.read(config.cluster_key_file) if config.cluster_key_file is not None else None
        self._config = config
        self._key = key
        self._epoch = new_epoch()
        self._lock = threading.Lock()
        self._ids = RegionTable()
        self._memory = AddressMap([])
        self._sessions: dict[str, HandoffSession] = {}
        self._stats = TransferStats()
        place = TransportConfig(
            self._epoch, config.host, key, config.data_port, config.mooncake_protocol, config.ib_device
        )
        self._transports = open_transports(config.transport, place)
        try:
            self._control = ControlServer(config.host, config.control_port, self._answer, key=key)
        except ConfigError:
            self._close_transports()
            raise
        self._session_id = str(SessionId(self._control.address, self._epoch))
        offered = ",".join(transport.name for transport in self._transports)
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
        with self._lock:
            try:
                for ptr, length in zip(ptrs, lengths, strict=True):
                    added.append(self._add(int(ptr), int(length)))
            except (MemServeError, ValueError) as error:
                logger.warning("memory not registered ranges=%d: %s", len(ptrs), error)
                for region in added:
                    self._remove(region)
                return _FAILED
        return 0

    def batch_deregister(self, ptrs: Sequence[int]) -> int:
        """As `deregister` for several ranges; 0, or negative if any of them failed."""
        result = 0
        with self._lock:
            for ptr in ptrs:
                region = self._memory.at(int(ptr))
                try:
                    if region is None:
                        raise OutOfBounds(f"nothing is registered at {int(ptr):#x}")
                    self._remove(region)
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
            self._session(session_id).write(self._memory.locate(own, sizes), theirs, sizes)
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
        """What this engine has written so far."""
        with self._lock:
            return TransferStats(self._stats.total, dict(self._stats.sessions))

    def close(self) -> None:
        """Answer no peer any more and let go of all memory. Idempotent."""
        self._control.close()
        with self._lock:
            sessions, self._sessions = self._sessions, {}
        for session in sessions.values():
            session.close()
        self._close_transports()

    def _close_transports(self) -> None:
        for transport in self._transports:
            transport.close()

    def _answer(self, message: Message) -> Message:
        if not isinstance(message, Open):
            return Refused(f"a transfer engine does not answer {type(message).__name__}")
        return Opened(
            epoch=self._epoch,
            endpoints=tuple(Endpoint(transport.name, transport.address) for transport in self._transports),
            regions=tuple(
                MemoryRange(region.region_id, region.address, region.num_bytes)
                for region in self._memory.regions
            ),
        )

    def _add(self, ptr: int, length: int) -> Region:
        if self._memory.overlaps(ptr, length):
            raise OutOfBounds(f"{length} bytes at {ptr:#x} overlap registered memory")
        region = Region(self._ids.next_id(), ptr, length)
        self._ids.add(region)
        for transport in self._transports:
            transport.register(region)
        self._memory = AddressMap([*self._memory.regions, region])
        return region

    def _remove(self, region: Region) -> None:
        self._memory = AddressMap([kept for kept in self._memory.regions if kept != region])
        self._ids.remove(region.region_id)
        for transport in self._transports:
            transport.deregister(region.region_id, timeout_s=self._config.timeout_s)

    def _session(self, text: str) -> HandoffSession:
        session = self._sessions.get(text)
        if session is None:
            made = HandoffSession(SessionId.parse(text), self._transports, self._key, self._config.timeout_s)
            with self._lock:
                session = self._sessions.setdefault(text, made)
        return session

    def _forget(self, text: str) -> None:
        """A session whose peer is gone; if the peer is there after all, the next use opens it anew."""
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
