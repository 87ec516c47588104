"""The byte geometry of one KV block, its digest, and the three ways to cut it into copies.

    [layer 0: part 0 | part 1] [layer 1: part 0 | part 1] ...      one contiguous extent
    part: [page_tokens, heads, width] of dtype; K and V, or the one buffer of latent attention

Knows numbers only: no tensors, no memory. Source: MemServe, section on transfer modes.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, fields
from enum import StrEnum
from functools import cached_property
from hashlib import sha256
from typing import NamedTuple


class TransferMode(StrEnum):
    """How the parts of a block are copied. Source: MemServe, "by-layer", "by-request", "aggregated"."""

    BY_LAYER = "by-layer"
    """One call per layer, as soon as the layer is complete: overlaps with compute."""
    BY_REQUEST = "by-request"
    """One call with one copy per part: for discrete HBM buffers."""
    AGGREGATED = "aggregated"
    """One call with one copy per block: for blocks that are one extent at both ends."""


class Part(NamedTuple):
    """One buffer of a layer: K, V, or K and V in one."""

    heads: int
    width: int
    """Elements per head and token."""


class Extents(NamedTuple):
    """Ranges within a block that one call moves: int64 arrays of one length, ascending."""

    offsets: array[int]
    lengths: array[int]


@dataclass(frozen=True)
class KVLayout:
    """Model, shape and type of a pool's blocks. Two pools may exchange blocks iff their digests are equal.

    Raises ValueError if a number is not positive.
    """

    model: str
    """The weights that computed the KV, by the operator's name: name, revision and quantization."""
    num_layers: int
    page_tokens: int
    parts: tuple[Part, ...]
    """Parts of each layer: K and V, which may differ in width, or one part for latent attention."""
    dtype: str
    dtype_bytes: int
    rank: int = 0
    """Which of `num_ranks` equal shards of the heads (or layers) this is."""
    num_ranks: int = 1

    def __post_init__(self) -> None:
        numbers = (
            self.num_layers,
            self.page_tokens,
            self.dtype_bytes,
            *(n for part in self.parts for n in part),
        )
        if not self.parts or min(numbers) < 1 or not 0 <= self.rank < self.num_ranks:
            raise ValueError(f"not a layout: {self}")

    @cached_property
    def part_bytes(self) -> tuple[int, ...]:
        """Bytes of each part of one layer, all tokens of the page."""
        return tuple(self.page_tokens * part.heads * part.width * self.dtype_bytes for part in self.parts)

    @cached_property
    def layer_bytes(self) -> int:
        return sum(self.part_bytes)

    @cached_property
    def block_bytes(self) -> int:
        return self.num_layers * self.layer_bytes

    @cached_property
    def digest(self) -> bytes:
        """32 bytes that differ if any field differs: the fingerprint that checksums and peers use."""
        identity = (
            self.model,
            self.num_layers,
            self.page_tokens,
            [tuple(part) for part in self.parts],
            self.dtype,
            self.dtype_bytes,
            self.rank,
            self.num_ranks,
        )
        return sha256(f"memserve-kv-layout-v1:{identity!r}".encode()).digest()

    def differences(self, other: KVLayout) -> list[str]:
        """The fields in which two layouts differ, as in "page_tokens 16 here, 64 there"."""
        names = [each.name for each in fields(self)]
        return [
            f"{name} {getattr(self, name)} here, {getattr(other, name)} there"
            for name in names
            if getattr(self, name) != getattr(other, name)
        ]

    def offset(self, layer: int, part: int) -> int:
        """Offset of a part in its block. Raises IndexError if there is no such layer or part."""
        if not (0 <= layer < self.num_layers and 0 <= part < len(self.parts)):
            raise IndexError(f"layer {layer}, part {part} of {self}")
        return layer * self.layer_bytes + sum(self.part_bytes[:part])

    def copy_plan(self, mode: TransferMode) -> list[Extents]:
        """The calls that copy one block, in order, each with its extents.

        For several blocks, each call copies its extents of all blocks: BY_LAYER makes num_layers calls,
        the other modes one. Together the extents cover the block exactly once.
        """
        if mode is TransferMode.AGGREGATED:
            return [Extents(array("q", [0]), array("q", [self.block_bytes]))]
        layers = [self._layer(layer) for layer in range(self.num_layers)]
        if mode is TransferMode.BY_LAYER:
            return layers
        every = Extents(array("q"), array("q"))
        for offsets, lengths in layers:
            every.offsets.extend(offsets)
            every.lengths.extend(lengths)
        return [every]

    def _layer(self, layer: int) -> Extents:
        offsets = (self.offset(layer, part) for part in range(len(self.parts)))
        return Extents(array("q", offsets), array("q", self.part_bytes))
