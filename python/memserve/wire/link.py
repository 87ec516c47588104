"""Request and answer over ZMQ, encrypted and authenticated when there is a cluster key.

    ControlClient (DEALER) --- [id, request] --->  ControlServer (ROUTER, own thread)
                           <-- [id, answer] -----

A handler that needs longer answers with a future, and the server goes on meanwhile.
With a key both ends run CURVE on key pairs derived from it: a process without the cluster key can
neither send a request nor read the traffic. Without a key, a server binds loopback only.
Knows no message's meaning.
"""

from __future__ import annotations

import itertools
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

import zmq
from zmq.utils import z85

from memserve.core.cluster_key import ClusterKey
from memserve.core.errors import ConfigError, InstanceLost, MemServeError, WireMismatch
from memserve.core.hosts import bracketed, is_loopback
from memserve.wire.messages import Message, Refused, decode, encode

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 16 << 20

Handler = Callable[[Message], "Message | Future[Message]"]
"""Returns the answer, or a future of it."""


class _PendingAnswers:
    """Answers that other threads have completed, and a descriptor that wakes the server's thread."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._ready: queue.SimpleQueue[tuple[bytes, bytes, Future[Message]]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False

    def expect(self, identity: bytes, request_id: bytes, future: Future[Message]) -> None:
        """Have `future` in `take` once it is done."""

        def ready(done: Future[Message]) -> None:
            self._ready.put((identity, request_id, done))
            self.wake()

        future.add_done_callback(ready)

    def wake(self) -> None:
        """Make `fd` readable. Any thread."""
        with self._lock:
            if not self._closed:
                os.eventfd_write(self.fd, 1)

    def take(self) -> list[tuple[bytes, bytes, Future[Message]]]:
        """The completed answers: (identity, request id, future)."""
        os.eventfd_read(self.fd)
        return [self._ready.get() for _ in range(self._ready.qsize())]

    def close(self) -> None:
        """Close the descriptor; answers that complete later are dropped."""
        with self._lock:
            self._closed = True
            os.close(self.fd)


class ControlServer:
    """Answers requests on one address, on a thread of its own; at once, or when a future is done."""

    def __init__(self, host: str, port: int, handler: Handler, *, key: ClusterKey | None = None) -> None:
        """Bind `host:port` (0: the system picks one) and start answering with `handler`.

        `handler` runs on this server's thread and should take microseconds. A MemServeError that it,
        or the future it returns, raises becomes a Refused; any other exception ends the process.
        The result of a future after `close` is dropped.
        Raises ConfigError if the address cannot be bound, or leaves the host without a key.
        """
        if key is None and not is_loopback(host):
            raise ConfigError(f"the control plane on {host} needs --cluster-key-file: it leaves this machine")
        self._handler = handler
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._socket.setsockopt(zmq.IPV6, ":" in host)
        if key is not None:
            self._socket.curve_secretkey = _key_pair(key)[1]
            self._socket.curve_server = True
        try:
            self._socket.bind(f"tcp://{bracketed(host)}:{port or '*'}")
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from error
        self.host = host
        self.port = int(self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rsplit(":", 1)[1])
        self._pending = _PendingAnswers()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"control-{self.port}", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """`host:port`, as a peer on the same network would write it."""
        return f"{bracketed(self.host)}:{self.port}"

    def close(self) -> None:
        """Stop answering and release the port. Idempotent."""
        self._closing.set()
        self._pending.wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._pending.fd, zmq.POLLIN)
        try:
            while not self._closing.is_set():
                ready = dict(poller.poll())
                if self._pending.fd in ready:
                    for identity, request_id, future in self._pending.take():
                        self._send(identity, request_id, future.result)
                if self._socket in ready:
                    self._receive(self._socket.recv_multipart())
        except Exception:
            logger.exception("the control thread failed; this process cannot go on")
            os._exit(1)
        finally:
            self._pending.close()
            self._context.destroy(linger=0)

    def _receive(self, frames: list[bytes]) -> None:
        if len(frames) != 3:
            logger.warning("control message ignored: %d frames", len(frames))
            return
        identity, request_id, body = frames
        self._send(identity, request_id, lambda: self._handler(decode(body)))

    def _send(
        self, identity: bytes, request_id: bytes, answer: Callable[[], Message | Future[Message]]
    ) -> None:
        try:
            reply = answer()
        except MemServeError as error:
            logger.warning("control message refused: %s", error)
            reply = Refused(str(error))
        if isinstance(reply, Future):
            self._pending.expect(identity, request_id, reply)
        else:
            self._socket.send_multipart([identity, request_id, encode(reply)])


class ControlLink(Protocol):
    """The interface of `ControlClient`; tests put faults behind it."""

    def request(self, message: Message, *, timeout_s: float) -> Message:
        """Send a request and return the answer. Raises InstanceLost if no answer comes."""
        ...

    def close(self) -> None:
        """Close the link."""
        ...


class ControlClient:
    """A client of one server. Any thread may call any method; requests are made one after another."""

    def __init__(self, address: str, *, key: ClusterKey | None = None) -> None:
        """`address` is `host:port`. Nothing is sent until the first request."""
        self.address = address
        self._key = key
        self._lock = threading.Lock()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        self._ids = itertools.count(1)

    def request(self, message: Message, *, timeout_s: float) -> Message:
        """Send `message`, return the answer.

        Raises InstanceLost if none came in time (the connection is made anew next time, and a late
        answer is dropped), WireMismatch if the peer speaks another version.
        """
        with self._lock:
            socket = self._connected()
            request_id = next(self._ids).to_bytes(8, "big")
            socket.send_multipart([request_id, encode(message)])
            deadline = time.monotonic() + timeout_s
            while (left := deadline - time.monotonic()) > 0:
                if not socket.poll(timeout=int(left * 1000) + 1):
                    continue
                frames = socket.recv_multipart()
                if len(frames) != 2:
                    raise WireMismatch(f"{self.address} answered with {len(frames)} frames")
                if frames[0] == request_id:
                    return decode(frames[1])
            self._disconnect()
        reason = f"no answer within {timeout_s:g} s (not there, or it has another cluster key)"
        raise InstanceLost(self.address, reason)

    def close(self) -> None:
        """Release the socket. Idempotent."""
        with self._lock:
            self._disconnect()
            self._context.destroy(linger=0)

    def _connected(self) -> zmq.Socket[bytes]:
        if self._socket is None:
            socket = self._context.socket(zmq.DEALER)
            connect(socket, self.address, self._key)
            self._socket = socket
        return self._socket

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._socket.close(linger=0)
            self._socket = None


def connect(socket: zmq.Socket[Any], address: str, key: ClusterKey | None) -> None:
    """Make a DEALER, just made, a client of the control server at `host:port`.

    Raises InstanceLost, having closed it, if that is no address.
    """
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.IPV6, address.startswith("["))
    if key is not None:
        public, secret = _key_pair(key)
        socket.curve_serverkey = public
        socket.curve_publickey, socket.curve_secretkey = public, secret
    try:
        socket.connect(f"tcp://{address}")
    except (zmq.ZMQError, ValueError) as error:
        socket.close(linger=0)
        raise InstanceLost(address, f"that is no address: {error}") from error


def _key_pair(key: ClusterKey) -> tuple[bytes, bytes]:
    """The CURVE key pair of the cluster. Its public half is a secret too: CURVE never sends a
    server's key, so knowing it is what admits a client."""
    secret = z85.encode(key.derive("zmq curve"))
    return zmq.curve_public(secret), secret
