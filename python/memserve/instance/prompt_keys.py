"""The keys of prompts that have come, for a router that knows their texts only.

Keys are cut on a thread: the scheduler hands over token ids and goes on. Any thread may call.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

from memserve.core.block_keys import BlockKey
from memserve.wire.messages import NamedPrompt

MAX_KEPT = 256
"""Prompts that nobody has taken yet: of more, the latest."""
MAX_KEYS = 1 << 14
"""Of one prompt. Of a longer one the rest stays unknown."""


class PromptKeyLog:
    """See the module."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._named: deque[NamedPrompt] = deque(maxlen=MAX_KEPT)
        self._lock = threading.Lock()

    def name(self, rid: str, keys: Callable[[], Sequence[BlockKey]]) -> None:
        """A prompt has come. `keys`, of its whole pages, is called on a thread."""
        self._executor.submit(self._name, rid, keys)

    def take(self) -> tuple[NamedPrompt, ...]:
        """Those that were named since the last time."""
        with self._lock:
            named = tuple(self._named)
            self._named.clear()
        return named

    def _name(self, rid: str, keys: Callable[[], Sequence[BlockKey]]) -> None:
        named = NamedPrompt(rid, tuple(keys()[:MAX_KEYS]))
        with self._lock:
            self._named.append(named)
