"""The sockets to one event publisher of SGLang's: its messages, the end of the connection, its replay.

    publisher (PUB)    ── topic, sequence, payload ──>  SUB ┐
    replay (ROUTER)    <── "", first sequence ────   DEALER ├─ one event loop, nothing blocks
                       ── "", topic, sequence, payload ──>  │
                       ── "", "", -1, "" ──>                ┘

A line is one connection, and so one process at the other end: when that is lost the line is over,
whatever ZMQ would do about it. Knows no payloads. Event loop thread only.
Source: SGLang 0.5.23, disaggregation/kv_events.py (ZmqEventPublisher).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from types import TracebackType

import zmq
from zmq.utils.monitor import parse_monitor_message

from memserve.router.server_info import EventSource

MAX_MESSAGE_BYTES = 8 << 20
"""ZMQ ends the connection to who sends more: a step's events are thousands of tokens, not millions."""
MAX_WAITING = 64
"""Messages read ahead. More than these wait at the publisher, which has room for 100,000."""
MAX_REPLAY_WAITING = 4096
"""The replay is sent at once, and what its sender cannot get rid of is dropped."""

_END = b"\xff" * 8
_MONITORED = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
_HEARTBEAT_MS = 5000

Numbered = tuple[int, bytes]
"""A sequence number and a payload."""


class MalformedFrames(Exception):
    """What came is not what SGLang sends. The line goes on."""


class StreamLost(Exception):
    """The publisher has gone, or broke the protocol. The line is of no use any more."""


class ZmqEventStream:
    """One connection to one publisher. A context manager: it connects on entry, and closes."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], source: EventSource) -> None:
        self._context = context
        self._source = source
        self._topic = source.topic.encode()
        self._readable = asyncio.Event()
        self._is_open = False

    def __enter__(self) -> ZmqEventStream:
        self._subscriber = _socket(self._context, zmq.SUB, self._source.endpoint, MAX_WAITING)
        self._monitor = self._subscriber.get_monitor_socket(_MONITORED)
        self._watch(self._monitor)
        self._watch(self._subscriber)
        try:
            self._subscriber.subscribe(self._topic)
            self._subscriber.connect(self._source.endpoint)
        except zmq.ZMQError as error:
            self._close()
            raise StreamLost(f"{self._source.endpoint}: {error.strerror}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    async def connected(self, timeout_s: float | None) -> bool:
        """Wait for the publisher; whether it is there."""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    self._look()
                    if self._is_open:
                        return True
                    await self._wait(None)
        except TimeoutError:
            return False

    async def next(self) -> Numbered:
        """The next live message. Raises MalformedFrames, and StreamLost if there will be none."""
        while True:
            self._look()
            try:
                frames = self._subscriber.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                await self._wait(None)
                continue
            if frames[0] == self._topic:
                return _numbered(frames[1:])

    async def replay(self, first: int, timeout_s: float) -> AsyncGenerator[Numbered | None, None]:
        """What the publisher still has from `first` on, and a None if that was all of it.

        Ends without it when nothing came for `timeout_s`. Raises as `next`. To be closed; one at a time.
        """
        if self._source.replay is None:
            return
        dealer = _socket(self._context, zmq.DEALER, self._source.replay, MAX_REPLAY_WAITING)
        self._unwatch(self._subscriber)  # nobody reads it meanwhile
        self._watch(dealer)
        try:
            dealer.connect(self._source.replay)
            dealer.send_multipart((b"", first.to_bytes(8, "big")), zmq.NOBLOCK)
            until_s = asyncio.get_running_loop().time() + timeout_s
            while True:
                self._look()
                try:
                    frames = dealer.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    if not await self._wait(until_s):
                        return
                    continue
                until_s = asyncio.get_running_loop().time() + timeout_s
                if len(frames) == 4 and frames[2] == _END:
                    yield None
                    return
                yield _numbered(frames[2:])
        except zmq.ZMQError as error:
            raise StreamLost(f"{self._source.replay}: {error.strerror}") from error
        finally:
            self._unwatch(dealer)
            dealer.close(linger=0)
            self._watch(self._subscriber)

    def _look(self) -> None:
        """Take in how the connection is. Comes before each message: that may be the next process's."""
        while True:
            try:
                event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))["event"]
            except zmq.Again:
                return
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._is_open = True
            elif self._is_open:
                raise StreamLost(f"{self._source.endpoint}: the connection is lost")

    async def _wait(self, until_s: float | None) -> bool:
        """Until a socket may have something; False if it is that late on the loop's clock."""
        try:
            async with asyncio.timeout_at(until_s):
                await self._readable.wait()
        except TimeoutError:
            return False
        self._readable.clear()
        return True

    def _watch(self, socket: zmq.Socket[bytes]) -> None:
        """ZMQ's descriptor is readable as long as a receive might find something new."""
        asyncio.get_running_loop().add_reader(socket.FD, self._readable.set)

    def _unwatch(self, socket: zmq.Socket[bytes]) -> None:
        asyncio.get_running_loop().remove_reader(socket.FD)

    def _close(self) -> None:
        self._unwatch(self._subscriber)
        self._unwatch(self._monitor)
        self._subscriber.disable_monitor()
        self._monitor.close(linger=0)
        self._subscriber.close(linger=0)


def _socket(
    context: zmq.Context[zmq.Socket[bytes]], kind: int, endpoint: str, max_waiting: int
) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.IPV6, "[" in endpoint)
    socket.setsockopt(zmq.RCVHWM, max_waiting)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
    socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 3 * _HEARTBEAT_MS)
    return socket


def _numbered(frames: list[bytes]) -> Numbered:
    if len(frames) != 2 or len(frames[0]) != 8 or frames[0] == _END:
        raise MalformedFrames
    return int.from_bytes(frames[0], "big"), frames[1]
