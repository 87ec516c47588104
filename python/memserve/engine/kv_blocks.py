"""Copies KV between SGLang's device pool (by layer and token) and blocks in an arena (by page).

    device   k_buffer[layer]: [tokens, kv_heads, head_dim], v_buffer alike      or latent attention's
             kv_buffer[layer]: [tokens, 1, latent]
    block    layer by layer, K before V: [page_tokens, heads, width] each       one extent, in DRAM

Works on the device of the pool. A copy is complete when its call returns. Knows no keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch

from memserve.core.kv_layout import KVLayout, Part
from memserve.mempool.arena import Arena

MAX_BATCH_BLOCKS = 64
"""Blocks copied at a time: bounds the staging memory on the device."""
MIN_RUN_BLOCKS = 4
"""Average length of a run of neighbours below which copies by index are faster."""


def layout_of(device_pool: Any, page_tokens: int, *, model: str, rank: int, num_ranks: int) -> KVLayout:
    """The layout of a device pool's pages as blocks.

    Raises ValueError unless the pool holds a K and a V, or one latent, per layer and token.
    """
    parts = _buffers(device_pool)
    first = [layers[0] for layers in parts]
    return KVLayout(
        model=model,
        num_layers=len(parts[0]),
        page_tokens=page_tokens,
        parts=tuple(Part(int(buffer.shape[1]), int(buffer.shape[2])) for buffer in first),
        dtype=str(first[0].dtype).removeprefix("torch."),
        dtype_bytes=first[0].dtype.itemsize,
        rank=rank,
        num_ranks=num_ranks,
    )


class KVBlocks:
    """The device pool of one rank, and the arena that holds its pages as blocks. Implements `pool.Device`."""

    def __init__(self, device_pool: Any, layout: KVLayout, arena: Arena) -> None:
        """`layout`: of the device pool (see `layout_of`) and of the arena's blocks."""
        self._page = layout.page_tokens
        # Each buffer by page, as SGLang allocates them: [pages, page_tokens * heads * width].
        self._parts = [[_by_page(buffer, self._page) for buffer in part] for part in _buffers(device_pool)]
        rows = torch.frombuffer(arena.memory, dtype=torch.uint8).view(-1, arena.slot_bytes)
        dtype = self._parts[0][0].dtype

        def view(layer: int, part: int) -> torch.Tensor:
            start = layout.offset(layer, part)
            return rows[:, start : start + layout.part_bytes[part]].view(dtype)

        # Each part of each layer in all slots: [slots, page_tokens * heads * width].
        self._views = [
            [view(layer, part) for layer in range(layout.num_layers)] for part in range(len(layout.parts))
        ]

    def pages(self, tokens: torch.Tensor) -> torch.Tensor:
        """The device pages of [n * page_tokens] device indices, in order: [n].

        Raises IndexError unless they are whole pages; SGLang's allocator gives out whole pages.
        """
        first = tokens[:: self._page]
        if len(tokens) % self._page or bool((first % self._page).any()):
            raise IndexError(f"{len(tokens)} tokens that are not whole pages of {self._page}")
        return first // self._page

    def pack(self, slots: Sequence[int], pages: torch.Tensor) -> None:
        """Copy pages[i] of the device to the block in slots[i]."""
        for start, stop, rows in _batches(slots):
            index = pages[start:stop]
            for views, buffers in zip(self._views, self._parts, strict=True):
                for blocks, buffer in zip(views, buffers, strict=True):
                    if isinstance(rows, torch.Tensor):
                        blocks.index_copy_(0, rows, buffer.index_select(0, index).cpu())
                    elif buffer.device.type == "cpu":
                        torch.index_select(buffer, 0, index, out=blocks[rows])
                    else:
                        blocks[rows].copy_(buffer.index_select(0, index))

    def load_layer(self, layer: int, slots: Sequence[int], pages: torch.Tensor) -> None:
        """Copy one layer of the block in slots[i] to pages[i] of the device."""
        for start, stop, rows in _batches(slots):
            for views, buffers in zip(self._views, self._parts, strict=True):
                buffer = buffers[layer]
                buffer.index_copy_(0, pages[start:stop], views[layer][rows].to(buffer.device))


def _batches(slots: Sequence[int]) -> Iterator[tuple[int, int, slice | torch.Tensor]]:
    """Batches of slots[start:stop] to copy in one call: as a slice if they are neighbours, else as an index.

    A pool allocates neighbours as long as it can; a run of them takes one copy instead of two.
    """
    gaps = [i for i in range(1, len(slots)) if slots[i] != slots[i - 1] + 1]
    are_scattered = len(gaps) * MIN_RUN_BLOCKS > len(slots)
    for first, end in pairwise([0, *(() if are_scattered else gaps), len(slots)]):
        for start in range(first, end, MAX_BATCH_BLOCKS):
            stop = min(start + MAX_BATCH_BLOCKS, end)
            if are_scattered:
                yield start, stop, torch.tensor(slots[start:stop])
            else:
                yield start, stop, slice(slots[start], slots[start] + stop - start)


def _by_page(buffer: torch.Tensor, page_tokens: int) -> torch.Tensor:
    """The same memory, one row per whole page."""
    num_pages = buffer.shape[0] // page_tokens
    return buffer[: num_pages * page_tokens].view(num_pages, -1)


def _buffers(device_pool: Any) -> Sequence[Sequence[torch.Tensor]]:
    """The parts of a device pool, each a buffer per layer."""
    keys, values = getattr(device_pool, "k_buffer", None), getattr(device_pool, "v_buffer", None)
    latents = getattr(device_pool, "kv_buffer", None)
    parts = [keys, values] if keys and values else [latents] if latents else []
    plain = [buffer.dim() == 3 and buffer.dtype == part[0].dtype for part in parts for buffer in part]
    if not parts or not all(plain) or len({part[0].dtype for part in parts}) != 1:
        raise ValueError(f"the memory pool does not serve {type(device_pool).__name__}: set --dram-gib 0")
    return parts
