"""A small pool, a fake device, and helpers that write blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from memserve.core.block_addr import BlockAddr, Tier
from memserve.core.block_keys import BlockKey, page_keys
from memserve.core.ids import Epoch
from memserve.core.kv_layout import KVLayout, Part
from memserve.mempool.arena import Arena
from memserve.mempool.eviction import EvictionPolicy, lru
from memserve.mempool.pool import MemPool

LAYOUT = KVLayout("small", 2, 1, (Part(1, 4),) * 2, "float32", 4)
EPOCH = Epoch(0x1234_5678_9ABC_DEF1)


def make_pool(
    num_slots: int, ordering: EvictionPolicy = lru, *, max_slots: int | None = None, hbm_slots: int = 0
) -> MemPool:
    """A pool with DRAM and, with `hbm_slots`, a second tier of its own, which is nearer."""
    others = {Tier.HBM: Arena(LAYOUT.block_bytes, hbm_slots)} if hbm_slots else {}
    dram = Arena(LAYOUT.block_bytes, num_slots, max_slots=max_slots)
    return MemPool(LAYOUT, dram, EPOCH, ordering, others=others)


class FakeDevice:
    """An engine's HBM: pages of bytes by number, and the pages that were copied out."""

    def __init__(self, pool: MemPool) -> None:
        self.pages: dict[int, bytes] = {}
        self.packed: list[int] = []
        self.meanwhile: list[Callable[[], object]] = []
        """Called once each, after a copy."""
        self._arena = pool.arena

    def write(self, keys: Sequence[BlockKey], first_page: int = 0) -> list[int]:
        """Pages with the content of these keys."""
        pages = list(range(first_page, first_page + len(keys)))
        self.pages |= {page: content(key) for page, key in zip(pages, keys, strict=True)}
        return pages

    def pack(self, slots: Sequence[int], pages: Sequence[int]) -> None:
        for slot, page in zip(slots, pages, strict=True):
            self._arena.block(slot)[:] = self.pages[page]
        self.packed += pages
        self._act()

    def load_layer(self, layer: int, slots: Sequence[int], pages: Sequence[int]) -> None:
        size = LAYOUT.block_bytes // LAYOUT.num_layers
        for slot, page in zip(slots, pages, strict=True):
            loaded = self.pages.get(page, b"") if layer else b""
            self.pages[page] = loaded + self._arena.block(slot)[layer * size : (layer + 1) * size]
        self._act()

    def _act(self) -> None:
        while self.meanwhile:
            self.meanwhile.pop()()


def keys_of(prompt: Sequence[int]) -> list[BlockKey]:
    """One block per token."""
    return page_keys(prompt, 1)


def content(key: BlockKey) -> bytes:
    """The KV of a block: like the real thing, a function of all tokens up to it."""
    return (key * LAYOUT.block_bytes)[: LAYOUT.block_bytes]


def write(pool: MemPool, keys: Sequence[BlockKey], tier: Tier = Tier.DRAM) -> list[BlockAddr]:
    """New PRIVATE blocks with the content of these keys, sealed."""
    addrs = pool.alloc_mem(len(keys), tier)
    for key, addr in zip(keys, addrs, strict=True):
        pool.block(addr)[:] = content(key)
    pool.seal(addrs)
    return addrs


def store(pool: MemPool, prompt: Sequence[int], tier: Tier = Tier.DRAM) -> None:
    """Cache a prompt as an engine does."""
    keys = keys_of(prompt)
    inserted = pool.insert(keys, write(pool, keys, tier))
    pool.free_mem([*inserted.duplicates, *inserted.orphans])
