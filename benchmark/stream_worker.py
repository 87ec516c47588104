"""A worker whose stream events contain their time of writing, and a client that notes their arrival.

Knows no router: `bench_router.py` puts one between the two. As a program it serves until it is stopped.
"""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvloop
from aiohttp import web

from memserve.testing.ending import start_child
from memserve.testing.fake_worker import FakeWorker
from memserve.wire.messages import Role

EVENT_GAP_S = 0.005
"""The streams pause so long between events: each is relayed on its own."""
NUM_EVENTS = 5
NUM_STREAMS = 30
BODY = json.dumps({"text": "x" * 4096, "sampling_params": {"max_new_tokens": 16}, "stream": True}).encode()
REQUEST = (
    b"POST /generate HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    % len(BODY)
) + BODY


class StreamWorker(FakeWorker):
    """Keeps no record; each event says when it was written, by the clock of the whole machine."""

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        await request.read()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for _ in range(NUM_EVENTS):
            await asyncio.sleep(EVENT_GAP_S)
            await response.write(b'data: {"sent": %r}\n\n' % time.monotonic())
        await response.write(b"data: [DONE]\n\n")
        return response


@contextmanager
def stream_worker() -> Iterator[int]:
    """A `StreamWorker` in a process of its own; its port."""
    process = start_child([sys.executable, __file__], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline())
    finally:
        process.terminate()
        process.wait()


async def first_event_ms(port: int) -> list[float]:
    """How late the first event of each of some streams was, all on one kept-alive connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    delays = []
    for _ in range(NUM_STREAMS):
        writer.write(REQUEST)
        event = await reader.readuntil(b"}\n\n")
        delays.append((time.monotonic() - json.loads(event.rpartition(b"data: ")[2])["sent"]) * 1e3)
        await reader.readuntil(b"\r\n0\r\n\r\n")
    writer.close()
    return delays


async def serve() -> None:
    """Serve until the process is ended."""
    logging.disable()  # some routers try HTTP/2 first
    async with StreamWorker(Role.COLOCATED) as worker:
        print(worker.port, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(serve())
