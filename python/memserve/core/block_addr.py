"""The address of a block: instance, tier and slot in one integer, so that an address needs no object.

     62 ........ 34  33 32  31 ......... 0
    [ tag: 29 bits |  tier |     slot      ]     an int64 on the wire and in arrays

The tag is a part of the epoch of the pool's process, so the address of an earlier epoch is invalid in the
next one. Knows no contents of slots. Source: MemServe ("addresses carry the instance").
"""

from __future__ import annotations

from enum import IntEnum
from typing import NewType

from memserve.core.ids import Epoch

BlockAddr = NewType("BlockAddr", int)
"""A slot of one tier of one process's pool. Never negative."""

MAX_SLOTS = (1 << 32) - 1

NO_SLOT = MAX_SLOTS
"""The one 32-bit number that is not a slot."""

_TIER_SHIFT, _TAG_SHIFT, _TAG_BITS = 32, 34, 29


class Tier(IntEnum):
    """The place of a block's bytes, nearest to the compute first. A further local tier goes before REMOTE."""

    HBM = 0
    DRAM = 1
    REMOTE = 2


LOCAL_TIERS = tuple(tier for tier in Tier if tier < Tier.REMOTE)
"""The tiers of an instance itself, so that LOCAL_TIERS[tier] is tier."""

READABLE_TIERS = frozenset({Tier.DRAM})
"""The local tiers whose blocks other instances read over a transport."""


def first_addr(epoch: Epoch, tier: Tier) -> BlockAddr:
    """The address of slot 0; the address of slot i is i more."""
    return BlockAddr(tag_of(epoch) << _TAG_SHIFT | tier << _TIER_SHIFT)


def tag_of(epoch: Epoch) -> int:
    """The tag of all addresses of that process."""
    return epoch >> (63 - _TAG_BITS)


def slot_of(addr: BlockAddr) -> int:
    return addr & NO_SLOT


def tier_of(addr: BlockAddr) -> Tier:
    return Tier(addr >> _TIER_SHIFT & 0b11)
