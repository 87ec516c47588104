"""A publisher of KV events like SGLang's, over real sockets, that can lose, garble and forget messages."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from memserve.core.block_keys import BlockKey, event_hash
from memserve.router.server_info import EventSource

DEADLINE_S = 10.0
END = b"\xff" * 8


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


def names(keys: Sequence[BlockKey]) -> list[int]:
    return [event_hash(key) for key in keys]


def stored(
    keys: Sequence[BlockKey], tokens: Sequence[Any] = (), parent: BlockKey | None = None, **more: Any
) -> dict[str, Any]:
    return {
        "type": "BlockStored",
        "block_hashes": names(keys),
        "parent_block_hash": None if parent is None else event_hash(parent),
        "token_ids": list(tokens),
        "block_size": len(tokens) // max(1, len(keys)),
        "lora_id": None,
        "medium": "GPU",
        **more,
    }


def removed(keys: Sequence[BlockKey], **more: Any) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": names(keys), "medium": "GPU", **more}


CLEARED = {"type": "AllBlocksCleared"}


def packed(*events: object) -> bytes:
    return msgspec.msgpack.encode([1.5, events, 0])


class FakePublisher:
    """The publisher of one worker. `kept`: the messages that it can replay."""

    def __init__(self, *, replays: bool = False, answers: bool = True, port: int | None = None) -> None:
        """`port`: None lets the system choose a free port."""
        self._context = zmq.asyncio.Context()
        self._topic = b"kv"
        self._answers = answers
        self._port = port
        self.num_asked = 0
        self._open()
        replay = None
        self._router: zmq.asyncio.Socket | None = None
        self._serving: asyncio.Task[None] | None = None
        if replays:
            self._router = self._context.socket(zmq.ROUTER)
            replay = f"tcp://127.0.0.1:{self._router.bind_to_random_port('tcp://127.0.0.1')}"
            self._serving = asyncio.create_task(self._serve())
        self.source = EventSource(f"tcp://127.0.0.1:{self._port}", "kv", replay)

    def _open(self) -> None:
        self.sequence = 0
        self.kept: list[tuple[int, bytes]] = []
        self._socket = self._context.socket(zmq.XPUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.XPUB_VERBOSE, 1)
        if self._port is None:
            self._port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        else:
            self._socket.bind(f"tcp://127.0.0.1:{self._port}")

    async def subscribed(self) -> None:
        """Wait for a subscriber: later messages arrive there."""
        async with asyncio.timeout(DEADLINE_S):
            while await self._socket.recv() != b"\x01" + self._topic:
                continue

    async def publish(self, *events: object, lost: bool = False, kept: bool = True) -> None:
        """Publish one message. `lost`: no subscriber receives it; `kept`: a replay repeats it."""
        await self.raw(packed(*events), lost=lost, kept=kept)

    async def raw(self, payload: bytes, *, lost: bool = False, kept: bool = True) -> None:
        sequence, self.sequence = self.sequence, self.sequence + 1
        if kept:
            self.kept.append((sequence, payload))
        if not lost:
            await self.frames(self._topic, sequence.to_bytes(8, "big"), payload)

    async def frames(self, *frames: bytes) -> None:
        await self._socket.send_multipart(frames)

    def vanish(self) -> None:
        """End the publisher's process."""
        self._socket.close(linger=0)

    async def restart(self) -> None:
        """Start another process at the same address."""
        self.vanish()
        async with asyncio.timeout(DEADLINE_S):
            while True:
                try:
                    self._open()
                except zmq.ZMQError:  # the port is not free yet
                    self._socket.close(linger=0)
                    await asyncio.sleep(0.002)
                else:
                    return

    async def close(self) -> None:
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.wait([self._serving])
        self._context.destroy(linger=0)

    async def _serve(self) -> None:
        assert self._router is not None
        while True:
            client, empty, first = await self._router.recv_multipart()
            self.num_asked += 1
            if not self._answers:
                continue
            for sequence, payload in self.kept:
                if sequence >= int.from_bytes(first, "big"):
                    number = sequence.to_bytes(8, "big")
                    await self._router.send_multipart((client, empty, self._topic, number, payload))
            await self._router.send_multipart((client, empty, b"", END, b""))
