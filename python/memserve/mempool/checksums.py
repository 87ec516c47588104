"""The checksum a block carries from the moment it leaves HBM until it is back.

xxh3 (64 bits) over the block's bytes, seeded with the layout's digest: a block of another model,
shape or precision fails it like a flipped bit does. It guards against broken memory, stray writes
and bugs, not against an attacker. Knows no slots or keys.
"""

from __future__ import annotations

from xxhash import xxh3_64_intdigest

from memserve.core.kv_layout import KVLayout


class Checksum:
    """The checksum function of one layout. Pure; any thread."""

    def __init__(self, layout: KVLayout) -> None:
        self._seed = int.from_bytes(layout.digest[:8], "little")

    def of(self, block: memoryview | bytes) -> int:
        """64 bits, unsigned, of a block's bytes."""
        return xxh3_64_intdigest(block, self._seed)
