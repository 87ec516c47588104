"""Asking control servers from an event loop: many requests under way at once, to any of them.

Same messages, same cluster key as `link.ControlClient`, which blocks and asks one thing at a time.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Container
from dataclasses import dataclass, field

import zmq
import zmq.asyncio

from memserve.core.cluster_key import ClusterKey
from memserve.core.errors import InstanceLost, WireMismatch
from memserve.wire.link import connect
from memserve.wire.messages import Message, decode, encode

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Peer:
    socket: zmq.asyncio.Socket
    reading: asyncio.Task[None]
    asked: dict[bytes, asyncio.Future[Message]] = field(default_factory=dict)


class AsyncControlClient:
    """Event loop thread only. Connections are made when first needed, and kept until `forget`."""

    def __init__(self, *, key: ClusterKey | None = None) -> None:
        self._key = key
        self._context = zmq.asyncio.Context()
        self._peers: dict[str, _Peer] = {}
        self._ids = itertools.count(1)

    async def request(self, address: str, message: Message, *, timeout_s: float) -> Message:
        """Send `message` to the server at `host:port`, return its answer.

        Raises InstanceLost if none came in time (a late one is dropped), WireMismatch for one that
        makes no sense.
        """
        peer = self._peers.get(address) or self._connect(address)
        request_id = next(self._ids).to_bytes(8, "big")
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        peer.asked[request_id] = answer
        try:
            async with asyncio.timeout(timeout_s):
                await peer.socket.send_multipart([request_id, encode(message)])
                return await answer
        except TimeoutError:
            raise InstanceLost(address, f"no answer within {timeout_s:g} s") from None
        finally:
            peer.asked.pop(request_id, None)

    def forget(self, address: str) -> None:
        """Close the connection to a server; requests in flight end by their timeout. Idempotent."""
        peer = self._peers.pop(address, None)
        if peer is not None:
            peer.reading.cancel()
            peer.socket.close(linger=0)

    def keep(self, addresses: Container[str]) -> None:
        """Forget all others."""
        for address in [address for address in self._peers if address not in addresses]:
            self.forget(address)

    def close(self) -> None:
        """Close all connections. Idempotent."""
        for address in list(self._peers):
            self.forget(address)
        self._context.destroy(linger=0)

    def _connect(self, address: str) -> _Peer:
        socket = self._context.socket(zmq.DEALER)
        connect(socket, address, self._key)
        peer = _Peer(socket, asyncio.create_task(self._read(address, socket)))
        self._peers[address] = peer
        return peer

    async def _read(self, address: str, socket: zmq.asyncio.Socket) -> None:
        while True:
            frames = await socket.recv_multipart()
            asked = self._peers[address].asked
            answer = asked.get(frames[0]) if len(frames) == 2 else None
            if answer is None or answer.done():
                logger.debug("late or odd answer dropped from=%s frames=%d", address, len(frames))
                continue
            try:
                answer.set_result(decode(frames[1]))
            except WireMismatch as error:
                answer.set_exception(error)
