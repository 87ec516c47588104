"""The memory owner's end of `tcp`: admits peers and copies between their streams and our regions.

One thread accepts, one serves each connection. A malformed request ends its connection with one log
line. Knows nothing of the other direction, which is `client`.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from memserve.core.errors import (
    ConfigError,
    InstanceLost,
    MemServeError,
    OutOfBounds,
    TransferFailed,
    TransferTimeout,
    WireMismatch,
)
from memserve.core.ids import Epoch
from memserve.transport.copies import Memory
from memserve.transport.local.syscalls import SocketVectors
from memserve.transport.regions import Int64s, Region
from memserve.transport.tcp import protocol
from memserve.transport.tcp.protocol import Status, TcpOperation
from memserve.transport.tcp.regions import OwnRegions, Rows, first_words
from memserve.transport.tcp.stream import NO_DEADLINE, Stream

logger = logging.getLogger(__name__)

_PAUSE_S = 0.1
"""Between attempts to accept when the process is out of descriptors."""


@dataclass(eq=False, slots=True)
class _AdmittedPeer:
    """One admitted connection."""

    stream: Stream
    epoch: Epoch
    connection_id: int
    region_ids: Int64s | tuple[int] | None = None
    """Regions that a copy in progress touches."""
    is_cut: bool = False


class TcpServer:
    """Serves `regions` to peers. Any thread may call any method."""

    def __init__(
        self,
        host: str,
        port: int,
        epoch: Epoch,
        keys: protocol.Authenticator,
        *,
        max_connections: int = 512,
        handshake_timeout_s: float = 5.0,
    ) -> None:
        """Listen on `host:port` (0: the system picks one). Raises ConfigError if it cannot listen."""
        self.regions = OwnRegions()
        self._epoch = epoch
        self._keys = keys
        self._max_connections = max_connections
        self._handshake_timeout_s = handshake_timeout_s
        self._calls = SocketVectors()
        self._changed = threading.Condition()
        self._connections: set[_AdmittedPeer] = set()
        self._num_connections = 0
        self._fenced: set[Epoch] = set()
        self._closed = False
        self._pause = threading.Event()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._listener = socket.create_server((host.strip("[]"), port), family=family, backlog=128)
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from error
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, name=f"tcp-accept-{self.port}", daemon=True).start()

    def register(self, region: Region) -> None:
        """Serve `region` from now on."""
        with self._changed:
            self.regions.add(region)

    def deregister(self, region_id: int, timeout_s: float) -> None:
        """Stop serving a region and cut the connections that are copying it."""
        with self._changed:
            self.regions.remove(region_id)
            self._end(
                lambda peer: peer.region_ids is not None and region_id in peer.region_ids,
                timeout_s,
            )

    def fence(self, epoch: Epoch, timeout_s: float) -> None:
        """Cut that process's connections and admit none again."""
        with self._changed:
            self._fenced.add(epoch)
            self._end(lambda peer: peer.epoch == epoch, timeout_s)

    def close(self, timeout_s: float) -> None:
        """Stop listening and cut every connection. Raises TransferTimeout if one is stuck."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._pause.set()
            self._listener.shutdown(socket.SHUT_RDWR)
            self._end(lambda peer: True, timeout_s)

    def _end(self, chosen: Callable[[_AdmittedPeer], bool], timeout_s: float) -> None:
        """Cut the chosen connections and wait until their threads are done. Holds the lock."""
        ending = {peer for peer in self._connections if chosen(peer)}
        for peer in ending:
            peer.is_cut = True
            peer.stream.cut()
        if not self._changed.wait_for(lambda: not ending & self._connections, timeout_s):
            raise TransferTimeout("a tcp peer", timeout_s)

    def _accept(self) -> None:
        try:
            while True:
                try:
                    connection, address = self._listener.accept()
                except OSError as error:
                    if self._closed:
                        break
                    logger.warning("tcp connection not accepted: %s", error.strerror)
                    self._pause.wait(_PAUSE_S)
                    continue
                self._start(connection, f"{address[0]}:{address[1]}")
        except Exception:
            logger.exception("the tcp transport's listener failed; this process cannot go on")
            os._exit(1)
        finally:
            self._listener.close()

    def _start(self, connection: socket.socket, name: str) -> None:
        with self._changed:
            if self._closed or self._num_connections >= self._max_connections:
                logger.warning("tcp connection refused peer=%s connections=%d", name, self._num_connections)
                connection.close()
                return
            self._num_connections += 1
        threading.Thread(
            target=self._serve, args=(connection, name), name=f"tcp-serve-{name}", daemon=True
        ).start()

    def _serve(self, connection: socket.socket, name: str) -> None:
        stream = Stream(connection, name, self._calls)
        peer: _AdmittedPeer | None = None
        try:
            peer = self._admit(stream)
            while True:
                self._answer(peer)
        except InstanceLost as error:
            logger.debug("tcp connection ended peer=%s: %s", name, error.reason)
        except MemServeError as error:
            logger.warning("tcp connection closed peer=%s: %s", name, error)
        except Exception:
            logger.exception("a tcp connection's thread failed; this process cannot go on")
            os._exit(1)
        finally:
            stream.close()
            with self._changed:
                self._num_connections -= 1
                if peer is not None:
                    self._connections.discard(peer)
                self._changed.notify_all()

    def _admit(self, stream: Stream) -> _AdmittedPeer:
        deadline = time.monotonic() + self._handshake_timeout_s
        hello = protocol.welcome(stream, self._epoch, self._keys, deadline)
        peer = _AdmittedPeer(stream, hello.epoch, hello.connection_id)
        with self._changed:
            refused = self._refusal(hello)
            if not refused:
                self._connections.add(peer)
        if refused:
            stream.send_bytes(protocol.reply(Status.NOT_ADMITTED, refused), deadline)
            raise TransferFailed(stream.name, refused)
        stream.send_bytes(protocol.reply(Status.DONE), deadline)
        return peer

    def _refusal(self, hello: protocol.HandshakeHello) -> str:
        if self._closed:
            return "the transport is closed"
        if hello.expected_epoch != self._epoch:
            return "another process was expected here"
        return "this epoch is fenced" if hello.epoch in self._fenced else ""

    def _answer(self, peer: _AdmittedPeer) -> None:
        stream = peer.stream
        operation, rows, num_bytes = protocol.receive_request(stream, NO_DEADLINE)
        if operation is TcpOperation.SETTLE:
            self._settle(peer, frozenset(int(given_up) for given_up in first_words(rows)))
            return
        try:
            memory = self._borrow(peer, rows)
        except OutOfBounds as error:
            if operation is TcpOperation.WRITE:
                stream.discard(num_bytes, NO_DEADLINE)
            stream.send_bytes(protocol.reply(Status.OUT_OF_BOUNDS, str(error)), NO_DEADLINE)
            return
        try:
            if memory.nbytes != num_bytes:
                raise WireMismatch(f"malformed request: {num_bytes} bytes do not fill its rows")
            if operation is TcpOperation.WRITE:
                stream.receive(memory, NO_DEADLINE)
            else:
                stream.send(protocol.reply(Status.DONE), memory, NO_DEADLINE)
        finally:
            with self._changed:
                peer.region_ids = None
        if operation is TcpOperation.WRITE:
            stream.send_bytes(protocol.reply(Status.DONE), NO_DEADLINE)

    def _borrow(self, peer: _AdmittedPeer, rows: Rows) -> Memory:
        """The memory of a request's rows, which stays registered until `region_ids` is None again.

        Raises OutOfBounds, or InstanceLost if the connection was cut meanwhile; nothing is borrowed then.
        """
        with self._changed:
            if peer.is_cut:
                raise InstanceLost(peer.stream.name, "this end was told to stop")
            memory = self.regions.memory(rows)
            peer.region_ids = first_words(rows)
        return memory

    def _settle(self, peer: _AdmittedPeer, given_up: frozenset[int]) -> None:
        """Cut the connections that their initiator has given up, and answer when they have ended."""
        try:
            with self._changed:
                self._end(
                    lambda other: (
                        other is not peer and other.epoch == peer.epoch and other.connection_id in given_up
                    ),
                    self._handshake_timeout_s,
                )
        except TransferTimeout:
            peer.stream.send_bytes(protocol.reply(Status.FAILED, "still copying"), NO_DEADLINE)
            return
        peer.stream.send_bytes(protocol.reply(Status.DONE), NO_DEADLINE)
