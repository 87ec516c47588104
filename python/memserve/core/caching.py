"""What a cluster keeps of the KV it has computed: the paper's caching steps as one value.

    step               prefill keeps   decode keeps   decode's KV goes home
    none     PD-Basic       -               -                 -
    prefill  PD-Caching-1   yes             -                 -
    both     PD-Caching-2   yes             yes               -
    full     PD-Caching-3   yes             yes               yes

Every instance of a cluster has the same value. Source: MemServe, section on caching steps.
"""

from __future__ import annotations

from enum import StrEnum


class CachingMode(StrEnum):
    """Ordered: each value does what the one before it does, and one thing more."""

    NONE = "none"
    """Nothing is kept after a request: every turn is computed, and moved, in full."""
    PREFILL = "prefill"
    """Prefill keeps what it has computed; decode gets the whole prompt's KV every time."""
    BOTH = "both"
    """Decode keeps its KV, too, and is sent only what it lacks."""
    FULL = "full"
    """When a request ends, decode sends the pages that prefill lacks home to prefill's DRAM."""

    @property
    def prefill_keeps(self) -> bool:
        return self is not CachingMode.NONE

    @property
    def decode_keeps(self) -> bool:
        return self in (CachingMode.BOTH, CachingMode.FULL)

    @property
    def returns(self) -> bool:
        return self is CachingMode.FULL
