"""The fetches that a router directs: a few at a time, a bounded number in all, each answered at its end.

Knows no transports: fetching is a call it was given.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

from memserve.core.block_keys import BlockKey
from memserve.core.errors import MemServeError
from memserve.core.executor import BoundedExecutor
from memserve.mempool.pool import MemPool
from memserve.peering.remote_process import PeerAddress
from memserve.wire.messages import Message
from memserve.wire.peer_messages import Fetch, Fetched

logger = logging.getLogger(__name__)


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
    """Any thread may call any method."""

    def __init__(self, fetch: FetchCall, *, max_fetches: int, num_threads: int) -> None:
        """`max_fetches`: running or waiting."""
        self._fetch = fetch
        self._max_fetches = max_fetches
        self._executor = BoundedExecutor("peer-fetch", capacity=max_fetches, workers=num_threads)

    def answer(self, fetch: Fetch, pool: MemPool | None) -> Message | Future[Message]:
        """The number of blocks cached here at the end, with the reason if it is not all. Returns at once."""
        if pool is None:
            return Fetched(0, "there is no pool of such blocks here")
        future = self._executor.submit(lambda: self._fetched(pool, fetch))
        if future is None:
            reason = f"{self._max_fetches} fetches are running or waiting"
            return Fetched(pool.num_cached(fetch.keys), reason)
        return future

    def close(self) -> None:
        """Wait for the running fetches, drop the others."""
        self._executor.close()

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
