"""Which computed KV a cluster keeps: the paper's caching steps as one value.

    step               prefill keeps   decode keeps   decode's KV returns
    none     PD-Basic       -               -                 -
    prefill  PD-Caching-1   yes             -                 -
    both     PD-Caching-2   yes             yes               -
    full     PD-Caching-3   yes             yes               yes

Every instance of a cluster has the same value. Source: MemServe, section on caching steps.
"""

from __future__ import annotations

from enum import StrEnum


class CachingMode(StrEnum):
    """Ordered: each mode adds one step to the mode before it."""

    NONE = "none"
    """No KV is kept after a request: every turn is computed, and moved, in full."""
    PREFILL = "prefill"
    """Prefill keeps the KV it has computed; decode receives the whole prompt's KV every time."""
    BOTH = "both"
    """Decode keeps its KV, too, and receives only the pages that it lacks."""
    FULL = "full"
    """When a request ends, decode sends the pages that prefill lacks to prefill's DRAM."""

    @property
    def prefill_keeps(self) -> bool:
        return self is not CachingMode.NONE

    @property
    def decode_keeps(self) -> bool:
        return self in (CachingMode.BOTH, CachingMode.FULL)

    @property
    def returns(self) -> bool:
        return self is CachingMode.FULL
