"""Copies by Mooncake's transfer engine: RDMA between hosts in production, its TCP to test the contract.

Optional: the `mooncake` extra of this package (on a machine without CUDA its `-non-cuda` wheel),
imported here and nowhere else. Its limits:
- it listens on all interfaces without authentication: for trusted networks only;
- it cannot refuse a peer (`fence`), nor call back bytes of a copy that timed out: `settle` succeeds
  only if the late copy turns out to be complete;
- `deregister` stops new copies; bytes of a copy in progress may still land with its TCP.

A call into the engine blocks for a minute when the peer does not answer, so calls run on threads of
their own and the caller waits for its own timeout only. Mooncake knows no epochs either: every process
publishes a word that holds its epoch, which the initiator reads before each copy.
Knows no control plane.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from memserve.core.errors import (
    ConfigError,
    InstanceLost,
    OutOfBounds,
    StaleEpoch,
    TransferFailed,
    TransferTimeout,
)
from memserve.core.ids import Epoch
from memserve.transport.base import Peer, Transport
from memserve.transport.copies import Copies, merge_pairs
from memserve.transport.regions import Region, RegionTable

logger = logging.getLogger(__name__)

MAX_CALLS = 64
"""Copies at a time, including those that their callers have given up."""

MAX_ROWS = 1024
"""Ranges of one call into the engine, whose TCP fails a batch that overflows its queue (4096)."""

_NO_ANSWER = -1
_STALE = -2
_FAILED = -3


class _Command(NamedTuple):
    """One batch, as Mooncake takes it. Keeps the engine alive while it runs."""

    engine: Any
    move: Callable[[str, list[int], list[int], list[int]], int]
    session: str
    epoch_address: int
    epoch: Epoch
    own: list[int]
    theirs: list[int]
    lengths: list[int]


class _Call:
    """A command that a worker runs; its caller may have stopped waiting."""

    def __init__(self, command: _Command) -> None:
        self.command = command
        self.code = _NO_ANSWER
        self.actual_epoch: Epoch | None = None
        self.ended = threading.Event()
        """The caller can stop waiting."""
        self.landed = threading.Event()
        """The engine has returned."""


class MooncakeTransport(Transport):
    """RDMA, or Mooncake's TCP."""

    name = "mooncake"

    def __init__(
        self, epoch: Epoch, host: str, protocol: Literal["rdma", "tcp"] = "rdma", devices: str = ""
    ) -> None:
        """Start an engine on `host`. `devices`: RDMA devices, comma-separated; empty: all.

        Raises ConfigError if the wheel or its libraries are missing, or `rdma` has no device
        (Mooncake itself would run TCP without a word).
        """
        if protocol == "rdma" and not rdma_devices():
            raise ConfigError("mooncake over rdma needs an RDMA device, and /sys/class/infiniband has none")
        self._engine: Any = _new_engine()
        if self._engine.initialize(host, "P2PHANDSHAKE", protocol, devices) != 0:
            raise ConfigError(f"mooncake cannot start on {host} with {protocol} {devices}")
        self._epoch = epoch
        self._regions = RegionTable()
        self._words = np.zeros(1 + MAX_CALLS, np.int64)
        """Our epoch for peers to read, then a word for each worker to read a peer's into."""
        self._words[0] = epoch
        if self._engine.register_memory(self._words.ctypes.data, self._words.nbytes) != 0:
            raise ConfigError("mooncake cannot register memory")
        self._address = f"{host}:{self._engine.get_rpc_port()}/{self._words.ctypes.data}"
        self._lock = threading.Lock()
        self._idle: list[queue.SimpleQueue[_Call | None]] = []
        self._num_workers = 0
        self._calls: set[_Call] = set()
        self._unsettled: defaultdict[Peer, set[_Call]] = defaultdict(set)
        self._closed = False
        logger.warning("mooncake listens on all interfaces without authentication protocol=%s", protocol)

    @property
    def address(self) -> str:
        """`Mooncake's session id/address of the word that holds our epoch`."""
        return self._address

    def register(self, region: Region) -> None:
        with self._lock:
            if self._engine is None:
                raise OutOfBounds("the mooncake transport was closed")
            self._regions.add(region)
            if self._engine.register_memory(region.address, region.num_bytes) != 0:
                self._regions.remove(region.region_id)
                raise OutOfBounds(f"mooncake does not register {region}")

    def deregister(self, region_id: int, *, timeout_s: float) -> None:
        with self._lock:
            found = [region for region in self._regions if region.region_id == region_id]
            self._regions.remove(region_id)
            if self._engine is not None and self._engine.unregister_memory(found[0].address) != 0:
                raise OutOfBounds(f"mooncake does not know region {region_id}")

    def connect(self, peer: Peer, *, timeout_s: float) -> None:
        self.read(peer, Copies.of([]), timeout_s=timeout_s)

    def disconnect(self, peer: Peer) -> None:
        with self._lock:
            self._unsettled.pop(peer, None)

    def write(self, peer: Peer, copies: Copies, *, timeout_s: float) -> None:
        self._move(peer, copies, "write", timeout_s)

    def read(self, peer: Peer, copies: Copies, *, timeout_s: float) -> None:
        self._move(peer, copies, "read", timeout_s)

    def settle(self, peer: Peer, *, timeout_s: float) -> None:
        with self._lock:
            calls = set(self._unsettled.get(peer, ()))
        deadline = time.monotonic() + timeout_s
        for call in calls:
            call.landed.wait(max(deadline - time.monotonic(), 0))
        settled = {call for call in calls if call.landed.is_set() and call.code == 0}
        with self._lock:
            self._unsettled[peer] -= settled
        if calls - settled:
            raise TransferTimeout(peer.name, timeout_s)

    def fence(self, epoch: Epoch, *, timeout_s: float) -> None:
        raise TransferFailed(f"epoch {epoch:016x}", "mooncake has no way to refuse a peer")

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._engine = None
            calls, self._calls = self._calls, set()
            idle, self._idle = self._idle, []
        for call in calls:
            call.ended.set()
        for inbox in idle:
            inbox.put(None)

    def _move(self, peer: Peer, copies: Copies, move: str, timeout_s: float) -> None:
        lengths = copies.num_bytes
        own = self._regions.resolve(copies.local_regions, copies.local_offsets, lengths)
        theirs = peer.regions.resolve(copies.remote_regions, copies.remote_offsets, lengths)
        own, theirs, lengths = merge_pairs(own, theirs, lengths)
        session, _, epoch_address = peer.address.rpartition("/")
        engine = self._engine
        if engine is None:
            raise TransferFailed(peer.name, "the mooncake transport was closed")
        call = _Call(
            _Command(
                engine,
                getattr(engine, f"batch_transfer_sync_{move}"),
                session,
                int(epoch_address),
                peer.epoch,
                own.tolist(),
                theirs.tolist(),
                lengths.tolist(),
            )
        )
        self._start(peer, call)
        call.ended.wait(timeout_s)
        if not call.landed.is_set():
            with self._lock:
                self._unsettled[peer].add(call)
                closed = self._closed
            if closed:
                raise TransferFailed(peer.name, "the mooncake transport was closed")
            raise TransferTimeout(peer.name, timeout_s)
        if call.code == _STALE:
            raise StaleEpoch(peer.name, peer.epoch, call.actual_epoch)
        if call.code == _NO_ANSWER:
            raise InstanceLost(peer.name, "mooncake cannot reach it")
        if call.code != 0:
            with self._lock:
                self._unsettled[peer].add(call)
            raise TransferFailed(peer.name, "mooncake gave up")

    def _start(self, peer: Peer, call: _Call) -> None:
        """Hand the call to a worker that is free, or a new one."""
        with self._lock:
            if self._closed:
                raise TransferFailed(peer.name, "the mooncake transport was closed")
            self._calls.add(call)
            if self._idle:
                self._idle.pop().put(call)
                return
            if self._num_workers == MAX_CALLS:
                self._calls.discard(call)
                raise TransferFailed(peer.name, f"{MAX_CALLS} copies wait for silent peers already")
            self._num_workers += 1
            number = self._num_workers
        inbox: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        inbox.put(call)
        threading.Thread(
            target=self._work, args=(inbox, number), name=f"mooncake-{number}", daemon=True
        ).start()

    def _work(self, inbox: queue.SimpleQueue[_Call | None], number: int) -> None:
        try:
            while (call := inbox.get()) is not None:
                self._run_command(call, number)
                with self._lock:
                    self._calls.discard(call)
                    self._idle.append(inbox)
                call.landed.set()
                call.ended.set()
                if self._closed:
                    return
        except Exception:
            logger.exception("a mooncake thread failed; this process cannot go on")
            os._exit(1)

    def _run_command(self, call: _Call, number: int) -> None:
        command = call.command
        word = self._words.ctypes.data + 8 * number
        read = command.engine.batch_transfer_sync_read
        if read(command.session, [word], [command.epoch_address], [8]) != 0:
            return
        if self._words[number] != command.epoch:
            call.actual_epoch = Epoch(int(self._words[number]))
            call.code = _STALE
            return
        for start in range(0, len(command.own), MAX_ROWS):
            rows = slice(start, start + MAX_ROWS)
            code = command.move(
                command.session, command.own[rows], command.theirs[rows], command.lengths[rows]
            )
            if code != 0:
                call.code = _FAILED
                return
        call.code = 0


def rdma_devices(root: Path = Path("/sys/class/infiniband")) -> tuple[str, ...]:
    """The RDMA devices that the kernel shows; none where `root` is missing."""
    try:
        return tuple(sorted(entry.name for entry in root.iterdir()))
    except OSError:
        return ()


def _new_engine() -> Any:
    try:
        from mooncake.engine import TransferEngine
    except ImportError as error:
        raise ConfigError(
            f"the mooncake transport cannot be loaded ({error}); install memserve[mooncake], or "
            "mooncake-transfer-engine-non-cuda and the libibverbs1 system package where there is no GPU"
        ) from error
    return TransferEngine()
