"""One connection to the KV event publisher of one stock SGLang server: messages, replays, loss.

    publisher (PUB)    ── topic, sequence, payload ──>  SUB ┐
    replay (ROUTER)    <── "", first sequence ────   DEALER ├─ zmq.asyncio
                       ── "", topic, sequence, payload ──>  │
                       ── "", "", -1, "" ──>                ┘

A stream is one connection and so one process at the other end: when the connection is lost the stream is
over, although ZMQ would reconnect. Knows no payloads. Event loop thread only.
Source: SGLang 0.5.23, disaggregation/kv_events.py (ZmqEventPublisher).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from memserve.router.server_info import EventSource

MAX_MESSAGE_BYTES = 8 << 20
"""ZMQ closes the connection on a larger message. The events of a step are thousands of tokens."""
MAX_WAITING = 64
"""Messages read ahead. More messages wait at the publisher, which keeps 100,000."""
MAX_REPLAY_WAITING = 4096
"""Messages of a replay read ahead: the publisher drops what it cannot send at once."""

_END = b"\xff" * 8
_MONITORED = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
_HEARTBEAT_MS = 5000

NumberedMessage = tuple[int, bytes]
"""A sequence number and a payload."""


class MalformedFrames(Exception):
    """A message is not framed as SGLang frames it. The stream goes on."""


class StreamLost(Exception):
    """The publisher has gone, or broke the protocol. The stream is over."""


class ZmqEventStream:
    """One connection to one publisher. A context manager: connects on entry, closes on exit."""

    def __init__(self, context: zmq.asyncio.Context, source: EventSource) -> None:
        self._context = context
        self._source = source
        self._is_open = False

    def __enter__(self) -> ZmqEventStream:
        self._subscriber = _socket(self._context, zmq.SUB, self._source.endpoint, MAX_WAITING)
        self._monitor = self._subscriber.get_monitor_socket(_MONITORED)
        try:
            self._subscriber.subscribe(self._source.topic)
            self._subscriber.connect(self._source.endpoint)
        except zmq.ZMQError as error:
            self.__exit__()
            raise StreamLost(f"{self._source.endpoint}: {error.strerror}") from error
        return self

    def __exit__(self, *error: object) -> None:
        self._subscriber.disable_monitor()
        self._monitor.close(linger=0)
        self._subscriber.close(linger=0)

    async def connected(self, timeout_s: float | None) -> bool:
        """Wait for the connection; False after `timeout_s`. Raises StreamLost."""
        try:
            async with asyncio.timeout(timeout_s):
                while not self._is_open:
                    await self._monitor.poll()
                    await self._update()
        except TimeoutError:
            return False
        return True

    async def next(self) -> NumberedMessage:
        """The next live message. Raises MalformedFrames and StreamLost."""
        while True:
            frames = await self._receive(self._subscriber)
            if frames[0] == self._source.topic.encode():
                return _numbered(frames[1:])

    async def replay(self, first: int, timeout_s: float) -> AsyncGenerator[NumberedMessage | None, None]:
        """The messages that the publisher still has from number `first` on; a final None if it sent all.

        Ends without None when no message arrives for `timeout_s`. Raises as `next`. Run one replay at a
        time, and close it.
        """
        if self._source.replay is None:
            return
        dealer = _socket(self._context, zmq.DEALER, self._source.replay, MAX_REPLAY_WAITING)
        try:
            dealer.connect(self._source.replay)
            await dealer.send_multipart((b"", first.to_bytes(8, "big")), zmq.NOBLOCK)
            while True:
                async with asyncio.timeout(timeout_s):
                    frames = await self._receive(dealer)
                if len(frames) == 4 and frames[2] == _END:
                    yield None
                    return
                yield _numbered(frames[2:])
        except TimeoutError:
            return
        except zmq.ZMQError as error:
            raise StreamLost(f"{self._source.replay}: {error.strerror}") from error
        finally:
            dealer.close(linger=0)

    async def _receive(self, socket: zmq.asyncio.Socket) -> list[bytes]:
        """The next message of this connection. Raises StreamLost."""
        poller = zmq.asyncio.Poller()
        poller.register(self._monitor, zmq.POLLIN)
        poller.register(socket, zmq.POLLIN)
        while True:
            await self._update()  # before each message, which may be of the next process
            try:
                return await socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                await poller.poll()

    async def _update(self) -> None:
        """Read the monitor's events. Raises StreamLost."""
        while True:
            try:
                event = (await recv_monitor_message(self._monitor, zmq.NOBLOCK))["event"]
            except zmq.Again:
                return
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._is_open = True
            elif self._is_open:
                raise StreamLost(f"{self._source.endpoint}: the connection is lost")


def _socket(context: zmq.asyncio.Context, kind: int, endpoint: str, max_waiting: int) -> zmq.asyncio.Socket:
    socket = context.socket(kind)
    for option, value in (
        (zmq.LINGER, 0),
        (zmq.IPV6, "[" in endpoint),
        (zmq.RCVHWM, max_waiting),
        (zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES),
        (zmq.RECONNECT_IVL_MAX, 2000),
        (zmq.HEARTBEAT_IVL, _HEARTBEAT_MS),
        (zmq.HEARTBEAT_TIMEOUT, 3 * _HEARTBEAT_MS),
    ):
        socket.setsockopt(option, value)
    return socket


def _numbered(frames: list[bytes]) -> NumberedMessage:
    if len(frames) != 2 or len(frames[0]) != 8 or frames[0] == _END:
        raise MalformedFrames
    return int.from_bytes(frames[0], "big"), frames[1]
