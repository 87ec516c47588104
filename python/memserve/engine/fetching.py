"""Requests that wait for blocks of other pools before the scheduler may take them.

    arrival      begin(request)     on the node's threads: locate, read, verify, insert into DRAM
    each batch   hold(queue)        those still waiting stay out of it; bounded by the node's timeout

All ranks of a server begin the same fetches in the same order, and let a request go together.
Scheduler thread only. Knows SGLang's requests and queue; not the peers.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

import torch

from memserve.core.block_keys import BlockKey, Namespace, page_keys
from memserve.instance.pool_agent import PoolAgent

IDLE_WAIT_S = 0.001
"""How long a scheduler that has nothing else to do lets the fetching threads run."""

AllReduceMin = Callable[[torch.Tensor], None]


class Fetching:
    """The fetches under way, by request. A fetch that raises, which is a bug, ends the scheduler."""

    def __init__(self, node: PoolAgent) -> None:
        self._node = node
        self._fetches: dict[str, Future[None]] = {}

    def begin(self, req: Any, num_reachable_tokens: int) -> None:
        """Look for what this rank can reach of the request's prompt in none of its own tiers."""
        page, tokens = self._node.pool.layout.page_tokens, req.origin_input_ids
        num_pages = (len(tokens) - 1) // page  # The last token is always computed.
        num_reachable = num_reachable_tokens // page
        if num_pages <= num_reachable:
            return
        namespace = Namespace(req.extra_key, req.cache_salt)

        def keys() -> list[BlockKey]:
            return page_keys(tokens[: num_pages * page], page, namespace)

        self._fetches[req.rid] = self._node.fetch(keys, num_reachable)

    def hold(self, queue: list[Any], all_reduce_min: AllReduceMin) -> list[Any]:
        """Those of `queue` that must wait, on every rank alike."""
        if not self._fetches:
            return []
        done = torch.tensor([fetch.done() for fetch in self._fetches.values()], dtype=torch.int)
        all_reduce_min(done)
        for rid, is_done in zip(list(self._fetches), done.tolist(), strict=True):
            if is_done:
                self._fetches.pop(rid).result()
        return [req for req in queue if req.rid in self._fetches]

    def wait(self) -> None:
        """Let the fetching threads run for a moment, when there is nothing else to do."""
        wait(self._fetches.values(), timeout=IDLE_WAIT_S)

    def drain(self) -> None:
        """Return when all that was begun has ended."""
        wait(self._fetches.values())
        self._fetches.clear()
