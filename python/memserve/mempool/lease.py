"""A hold on cached blocks. Knows no pool: releasing is a call it was given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType

from memserve.core.block_addr import BlockAddr
from memserve.core.block_keys import BlockKey
from memserve.mempool.index import CachedNode


class Lease:
    """Cached blocks that keep their place until `MemPool.release`: a context manager, left once."""

    def __init__(
        self,
        keys: Sequence[BlockKey],
        addrs: Sequence[BlockAddr],
        nodes: Sequence[CachedNode | None],
        release: Callable[[Lease], None],
    ) -> None:
        self.keys = keys
        """What is held: the cached prefix of what was matched, which may have become shorter."""
        self.addrs = addrs
        """addrs[i] holds keys[i]."""
        self.nodes = nodes
        """The pool's: the last of the blocks in each tier, None if there is none."""
        self._release = release

    def __len__(self) -> int:
        return len(self.keys)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release(self)
