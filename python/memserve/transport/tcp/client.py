"""Copies over TCP straight into registered memory: any two hosts, no device, authenticated.

A connection carries one request at a time, so each copying thread has its own, kept for the next
call. A write is done when the owner has confirmed that the bytes are in place. A connection that
fails during a copy is aborted and remembered: the owner's kernel may still hold bytes of it, and
`settle` asks the owner, over a new connection, to drop them. Knows no control plane.
"""

from __future__ import annotations

import logging
import secrets
import socket
import threading
import time
from collections import defaultdict

import numpy as np

from memserve.core.cluster_key import ClusterKey
from memserve.core.errors import (
    ConfigError,
    InstanceLost,
    MemServeError,
    OutOfBounds,
    TransferFailed,
    TransferTimeout,
)
from memserve.core.hosts import bracketed, is_loopback
from memserve.core.ids import Epoch
from memserve.transport.base import Peer, Transport
from memserve.transport.copies import Copies, Memory
from memserve.transport.local.syscalls import SocketVectors
from memserve.transport.regions import Region
from memserve.transport.tcp import protocol
from memserve.transport.tcp.protocol import TcpOperation
from memserve.transport.tcp.regions import rows_of
from memserve.transport.tcp.server import TcpServer
from memserve.transport.tcp.stream import Stream

logger = logging.getLogger(__name__)

_CLOSE_TIMEOUT_S = 1.0


class _TcpConnection:
    """One connection to a peer."""

    def __init__(self, stream: Stream, connection_id: int) -> None:
        self.stream = stream
        self.connection_id = connection_id


class TcpTransport(Transport):
    """Any host."""

    name = "tcp"

    def __init__(self, epoch: Epoch, host: str, port: int = 0, *, key: ClusterKey | None = None) -> None:
        """Listen on `host:port` (0: the system picks one).

        Raises ConfigError if it cannot, or if that address leaves the host without a cluster key.
        """
        if key is None and not is_loopback(host):
            raise ConfigError(f"the tcp transport on {host} needs --cluster-key-file: it leaves this machine")
        self._epoch = epoch
        self._keys = protocol.Authenticator(key)
        self._server = TcpServer(host, port, epoch, self._keys)
        self._address = f"{bracketed(host)}:{self._server.port}"
        self._calls = SocketVectors()
        self._lock = threading.Lock()
        self._idle: defaultdict[Peer, list[_TcpConnection]] = defaultdict(list)
        self._used: set[_TcpConnection] = set()
        self._unsettled: defaultdict[Peer, set[int]] = defaultdict(set)
        self._closed = False

    @property
    def address(self) -> str:
        """`host:port`."""
        return self._address

    def register(self, region: Region) -> None:
        self._server.register(region)

    def deregister(self, region_id: int, *, timeout_s: float) -> None:
        self._server.deregister(region_id, timeout_s)

    def connect(self, peer: Peer, *, timeout_s: float) -> None:
        self._give(peer, self._take(peer, time.monotonic() + timeout_s))

    def disconnect(self, peer: Peer) -> None:
        with self._lock:
            self._unsettled.pop(peer, None)
            connections = self._idle.pop(peer, [])
        for connection in connections:
            connection.stream.close()

    def write(self, peer: Peer, copies: Copies, *, timeout_s: float) -> None:
        self._move(peer, copies, TcpOperation.WRITE, timeout_s)

    def read(self, peer: Peer, copies: Copies, *, timeout_s: float) -> None:
        self._move(peer, copies, TcpOperation.READ, timeout_s)

    def settle(self, peer: Peer, *, timeout_s: float) -> None:
        with self._lock:
            given_up = set(self._unsettled.get(peer, ()))
        if not given_up:
            return
        deadline = time.monotonic() + timeout_s
        try:
            connection = self._take(peer, deadline)
        except InstanceLost as error:
            if isinstance(error.__cause__, ConnectionRefusedError):
                raise  # The peer's process has ended.
            raise TransferTimeout(peer.name, timeout_s) from error
        rows = np.array([(connection_id, 0, 0) for connection_id in given_up], np.int64)
        try:
            connection.stream.send_bytes(protocol.request(TcpOperation.SETTLE, rows, 0), deadline)
            protocol.receive_reply(connection.stream, deadline)
        except TransferFailed as error:
            self._give(peer, connection)
            raise TransferTimeout(peer.name, timeout_s) from error
        except MemServeError as error:
            self._drop(peer, connection)
            raise TransferTimeout(peer.name, timeout_s) from error
        self._give(peer, connection)
        with self._lock:
            self._unsettled[peer] -= given_up

    def fence(self, epoch: Epoch, *, timeout_s: float) -> None:
        self._server.fence(epoch, timeout_s)

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for connection in self._used:
                connection.stream.cut()
            for connections in self._idle.values():
                for connection in connections:
                    connection.stream.close()
            self._idle.clear()
        try:
            self._server.close(_CLOSE_TIMEOUT_S)
        except TransferTimeout:
            logger.warning("tcp transport closed while a peer was still copying")

    def _move(self, peer: Peer, copies: Copies, operation: TcpOperation, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        starts = range(0, len(copies), protocol.MAX_ROWS)
        parts = [copies.part(start, start + protocol.MAX_ROWS) for start in starts]
        local = [
            self._server.regions.memory(rows_of(part.local_regions, part.local_offsets, part.num_bytes))
            for part in parts
        ]
        connection = self._take(peer, deadline)
        try:
            for part, memory in zip(parts, local, strict=True):
                self._ask(connection.stream, operation, part, memory, deadline)
        except OutOfBounds:
            self._give(peer, connection)
            raise
        except InstanceLost as error:
            self._drop(peer, connection)
            if self._closed:
                raise TransferFailed(peer.name, "the tcp transport was closed") from error
            raise
        except TransferTimeout as error:
            self._drop(peer, connection)
            raise TransferTimeout(peer.name, timeout_s) from error
        except MemServeError:
            self._drop(peer, connection)
            raise
        self._give(peer, connection)

    def _ask(
        self, stream: Stream, operation: TcpOperation, copies: Copies, memory: Memory, deadline: float
    ) -> None:
        """Send one request and receive its answer."""
        rows = rows_of(copies.remote_regions, copies.remote_offsets, copies.num_bytes)
        request = protocol.request(operation, rows, memory.nbytes)
        if operation is TcpOperation.WRITE:
            stream.send(request, memory, deadline)
            protocol.receive_reply(stream, deadline)
        else:
            stream.send_bytes(request, deadline)
            protocol.receive_reply(stream, deadline)
            stream.receive(memory, deadline)

    def _take(self, peer: Peer, deadline: float) -> _TcpConnection:
        """A connection that no other thread uses, a new one if all are in use."""
        with self._lock:
            if self._closed:
                raise TransferFailed(peer.name, "the tcp transport was closed")
            idle = self._idle.get(peer)
            connection = idle.pop() if idle else None
            if connection is not None:
                self._used.add(connection)
                return connection
        connection = self._connected(peer, deadline)
        with self._lock:
            if not self._closed:
                self._used.add(connection)
                return connection
        connection.stream.abort()
        raise TransferFailed(peer.name, "the tcp transport was closed")

    def _give(self, peer: Peer, connection: _TcpConnection) -> None:
        """Keep a connection, whose last request was answered, for the next request."""
        with self._lock:
            self._used.discard(connection)
            if not self._closed:
                self._idle[peer].append(connection)
                return
        connection.stream.close()

    def _drop(self, peer: Peer, connection: _TcpConnection) -> None:
        """Abort a connection whose last request was not answered, and remember it for `settle`."""
        with self._lock:
            self._used.discard(connection)
            self._unsettled[peer].add(connection.connection_id)
        connection.stream.abort()

    def _connected(self, peer: Peer, deadline: float) -> _TcpConnection:
        host, _, port = peer.address.rpartition(":")
        left = max(deadline - time.monotonic(), 0.001)
        try:
            opened = socket.create_connection((host.strip("[]"), int(port)), timeout=left)
        except TimeoutError as error:
            raise TransferTimeout(peer.name, left) from error
        except OSError as error:
            raise InstanceLost(peer.name, f"cannot connect: {error.strerror}") from error
        stream = Stream(opened, peer.name, self._calls)
        hello = protocol.HandshakeHello(self._epoch, peer.epoch, secrets.randbits(63))
        try:
            protocol.introduce(stream, hello, self._keys, deadline)
        except TransferTimeout as error:
            stream.abort()
            raise TransferTimeout(peer.name, left) from error
        except MemServeError:
            stream.abort()
            raise
        return _TcpConnection(stream, hello.connection_id)
