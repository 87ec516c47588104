"""Moves KV between SGLang's device pool (by layer and token) and blocks in an arena (by page).

    device   k_buffer[layer]: [tokens, kv_heads, head_dim]      v_buffer[layer]: the same
    block    [layers, 2, page_tokens, kv_heads, head_dim]       one extent, in DRAM

Works on whatever device the pool is on; copies end before a call returns. Knows no keys.
"""

from __future__ import annotations

from typing import Any

import torch

from memserve.core.kv_layout import KVLayout, Part
from memserve.mempool.arena import Arena

PACK_BLOCKS = 64
"""Blocks packed at a time: bounds the staging memory on the device."""


def layout_of(device_pool: Any, page_tokens: int, *, model: str, rank: int, num_ranks: int) -> KVLayout:
    """The layout that pages of a device pool have as blocks.

    Raises ValueError for a pool without separate keys and values of one shape.
    """
    keys, values = getattr(device_pool, "k_buffer", None), getattr(device_pool, "v_buffer", None)
    if not keys or not values or keys[0].shape != values[0].shape or keys[0].dim() != 3:
        raise ValueError(f"the DRAM tier does not serve {type(device_pool).__name__}: leave --dram-gib out")
    _, heads, dim = keys[0].shape
    return KVLayout(
        model=model,
        num_layers=len(keys),
        page_tokens=page_tokens,
        parts=(Part(heads, dim), Part(heads, dim)),
        dtype=str(keys[0].dtype).removeprefix("torch."),
        dtype_bytes=keys[0].dtype.itemsize,
        rank=rank,
        num_ranks=num_ranks,
    )


class KVBlocks:
    """The device pool of one rank, and an arena that holds its pages as blocks."""

    def __init__(self, device_pool: Any, layout: KVLayout, arena: Arena) -> None:
        """`layout` is the pool's (see `layout_of`), and that of the arena's blocks."""
        self._keys, self._values = device_pool.k_buffer, device_pool.v_buffer
        self._page = (layout.page_tokens, *layout.parts[0])
        rows = torch.frombuffer(arena.memory, dtype=torch.uint8).view(arena.num_slots, arena.slot_bytes)
        shape = (layout.num_layers, len(layout.parts), *self._page)
        self._blocks = rows[:, : arena.block_bytes].view(self._keys[0].dtype).unflatten(1, shape)

    def pack(self, slots: list[int], tokens: torch.Tensor) -> None:
        """Copy pages into blocks. tokens: [len(slots) * page_tokens], device indices in page order."""
        page = self._page[0]
        for start in range(0, len(slots), PACK_BLOCKS):
            some = torch.tensor(slots[start : start + PACK_BLOCKS])
            index = tokens[start * page : (start + len(some)) * page]
            pages = (len(some), *self._page)
            for layer, (keys, values) in enumerate(zip(self._keys, self._values, strict=True)):
                for part, buffer in enumerate((keys, values)):
                    self._blocks[some, layer, part] = buffer.index_select(0, index).view(pages).cpu()

    def load_layer(self, layer: int, slots: list[int], tokens: torch.Tensor) -> None:
        """Copy one layer of blocks back. tokens: as in `pack`."""
        some = torch.tensor(slots)
        for part, buffer in enumerate((self._keys[layer], self._values[layer])):
            rows = self._blocks[some, layer, part].flatten(0, 1)
            buffer.index_copy_(0, tokens, rows.to(buffer.device))
