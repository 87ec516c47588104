"""Fetches that a router asks for: each answered when it is over, a few at a time, a bounded number in all.

Knows no transports: fetching is a call it was given.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from memserve.core.block_keys import BlockKey
from memserve.core.errors import MemServeError
from memserve.mempool.pool import MemPool
from memserve.mempool.remote.config import PeerAddress
from memserve.wire.messages import Message
from memserve.wire.peer_messages import Fetch, Fetched

logger = logging.getLogger(__name__)

MAX_RUNNING = 4
MAX_FETCHES = 32
"""Running or waiting."""


class FetchCall(Protocol):
    """`Peers.fetch`."""

    def __call__(
        self,
        peer: PeerAddress,
        pool: MemPool,
        keys: Sequence[BlockKey],
        *,
        parent: BlockKey | None = None,
        timeout_s: float,
    ) -> int: ...


class Fetches:
    """Any thread may ask."""

    def __init__(self, fetch: FetchCall) -> None:
        self._fetch = fetch
        self._threads = ThreadPoolExecutor(MAX_RUNNING, thread_name_prefix="peer-fetch")
        self._places = threading.BoundedSemaphore(MAX_FETCHES)

    def answer(self, fetch: Fetch, pool: MemPool | None) -> Message | Future[Message]:
        """What is here at the end, with the reason if that is not all. Returns at once."""
        if pool is None:
            return Fetched(0, "there is no pool of such blocks here")
        if not self._places.acquire(blocking=False):
            return Fetched(pool.num_cached(fetch.keys), f"{MAX_FETCHES} fetches are running or waiting")
        try:
            future: Future[Message] = self._threads.submit(self._fetched, pool, fetch)
        except RuntimeError:
            self._places.release()
            return Fetched(pool.num_cached(fetch.keys), "this end is closed")
        future.add_done_callback(lambda _: self._places.release())
        return future

    def close(self) -> None:
        """Wait for those that run, drop those that wait."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _fetched(self, pool: MemPool, fetch: Fetch) -> Message:
        holder = PeerAddress(fetch.holder, fetch.holder_epoch)
        reason = "the holder has no more of it"
        try:
            self._fetch(holder, pool, fetch.keys, parent=fetch.parent, timeout_s=fetch.timeout_s)
        except MemServeError as error:
            logger.warning("not fetched from=%s: %s", holder, error)
            reason = str(error)
        num_blocks = pool.num_cached(fetch.keys)
        return Fetched(num_blocks, "" if num_blocks == len(fetch.keys) else reason)
