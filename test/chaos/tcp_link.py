"""A TCP link that can be cut, silenced or slowed. Knows no protocol."""

from __future__ import annotations

import asyncio
from contextlib import suppress

SLOW_S = 0.05
SLOW_BYTES = 512


class TcpLink:
    """Forwards the bytes of connections to a port of its own. Event loop thread only."""

    def __init__(self) -> None:
        self.how = "well"
        """well; slow: few bytes at a time; silent: nothing arrives; cut: connections are reset."""
        self.port = 0
        self._target = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()

    async def open(self) -> None:
        """Start to listen."""
        self._server = await asyncio.start_server(self._accepted, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    def lead_to(self, port: int) -> None:
        """Set the target of connections."""
        self._target = port

    def behave(self, how: str) -> None:
        """Set the state from now on, also of open connections."""
        self.how = how
        self._changed.set()
        self._changed = asyncio.Event()
        if how == "cut":
            for writer in list(self._writers):
                writer.transport.abort()

    async def close(self) -> None:
        """Close the link and its connections."""
        if self._server is not None:
            self._server.close()
        self.behave("cut")
        for task in self._tasks:
            task.cancel()

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.how == "cut":
            writer.transport.abort()
            return
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, back}
        for source, sink in ((reader, back), (there, writer)):
            task = asyncio.create_task(self._pass_on(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass_on(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(SLOW_BYTES if self.how == "slow" else 1 << 16):
                if self.how == "slow":
                    await asyncio.sleep(SLOW_S)
                while self.how == "silent":
                    await self._changed.wait()
                sink.write(data)
                await sink.drain()
        self._writers.discard(sink)
        sink.close()
