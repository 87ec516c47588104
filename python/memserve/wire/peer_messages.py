"""The messages between processes that exchange memory. `messages` joins them to all others."""

from __future__ import annotations

from typing import Annotated

import msgspec

from memserve.core.block_keys import BlockKey
from memserve.core.ids import Epoch
from memserve.core.kv_layout import KVLayout

Seconds = Annotated[float, msgspec.Meta(ge=0, le=86400)]


class TransportAddress(msgspec.Struct, frozen=True):
    """One transport of a process, and the text by which the same transport of a peer reaches it."""

    transport: str
    address: str


class MemoryRange(msgspec.Struct, frozen=True):
    """One registered region of the answering process."""

    region_id: int
    address: int
    num_bytes: int


class Hello(msgspec.Struct, frozen=True, tag=True):
    """Process → process: the first message between two. Answered `Welcome`, `Refused`, `Declined`."""

    epoch: Epoch
    """Of the sender."""
    peer_epoch: Epoch
    """Of the process that the sender expects at this address."""
    data_epoch: Epoch
    """Of the sender's transports: `epoch`, or a later one after it was fenced."""
    layout: KVLayout | None = None
    """Of the blocks that the sender wants to exchange; None for the prefill/decode handoff."""


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """Process → process: how the answering process's memory is reached. Void if `epoch` is another one."""

    epoch: Epoch
    data_epoch: Epoch
    """Of the answering process's transports."""
    endpoints: tuple[TransportAddress, ...]
    regions: tuple[MemoryRange, ...]
    """The arena of the blocks in question; without a layout, all memory registered for the handoff."""
    slot_bytes: int = 0
    """Of the arena; 0 without a layout."""
    is_fenced: bool = False
    """The data epoch of the Hello is refused for good: repeat it under another one."""


class Reserve(msgspec.Struct, frozen=True, tag=True):
    """Pool → pool: reserve slots for the blocks of a chain that are missing. Answered `Reserved`, `Declined`.

    keys[0] follows `parent`, or begins a prompt. `transfer_id` is the sender's, never used twice;
    a repeated request gets the same answer. The answer `Unknown`, here and below, requires a Hello first.
    """

    epoch: Epoch
    transfer_id: int
    layout: bytes
    """Digest."""
    keys: tuple[BlockKey, ...]
    parent: BlockKey | None


class Reserved(msgspec.Struct, frozen=True, tag=True):
    """Pool → pool: the sender may write to these slots, then has to commit or cancel."""

    num_known: int
    """Blocks of the chain, from its front, that the receiver has."""
    addrs: tuple[int, ...]
    """`BlockAddr` of a slot for each block after those."""


class Declined(msgspec.Struct, frozen=True, tag=True):
    """Pool → pool: the request is declined for now; nothing has changed."""

    reason: str
    parent_unknown: bool = False
    """The parent is not cached: the chain may be accepted from its root."""


class Commit(msgspec.Struct, frozen=True, tag=True):
    """Pool → pool: all bytes of a reservation are in place. Answered `Committed`, `Declined`."""

    epoch: Epoch
    transfer_id: int
    checksums: tuple[int, ...]
    """Of each block written, in the order of the reserved addresses."""


class Committed(msgspec.Struct, frozen=True, tag=True):
    """Pool → pool: the number of blocks that were indexed and were not cached before."""

    num_new: int


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Pool → pool: a reservation will not be committed. Answered `Done`, also if it is unknown."""

    epoch: Epoch
    transfer_id: int
    settled: bool
    """No byte of the sender can land any more; otherwise the blocks stay in quarantine."""


class Locate(msgspec.Struct, frozen=True, tag=True):
    """Any process → pool: how much of this chain is cached? Answered `Located`."""

    layout: bytes
    keys: tuple[BlockKey, ...]


class Located(msgspec.Struct, frozen=True, tag=True):
    """Pool → any process: the cached prefix, and the room."""

    num_blocks: int
    num_free: int = 0
    """Free blocks of that layout."""
    num_evictable: int = 0
    """Cached blocks that could be evicted."""


class AcquireLease(msgspec.Struct, frozen=True, tag=True):
    """Pool → pool: lease these blocks for a read. Answered `Leased`, empty if none is cached."""

    epoch: Epoch
    lease_id: int
    """The reader's, never used twice; a repeated request gets the same answer."""
    layout: bytes
    keys: tuple[BlockKey, ...]


class Leased(msgspec.Struct, frozen=True, tag=True):
    """Pool → pool: addresses and checksums of the longest cached prefix."""

    addrs: tuple[int, ...]
    checksums: tuple[int, ...]


class ReleaseLease(msgspec.Struct, frozen=True, tag=True):
    """Pool → pool: the blocks are read. Answered `Done`, also if the lease is unknown or has run out."""

    epoch: Epoch
    lease_id: int


class Fetch(msgspec.Struct, frozen=True, tag=True):
    """Router → pool: copy the missing blocks of this chain from `holder`. Answered `Fetched`."""

    layout: bytes
    keys: tuple[BlockKey, ...]
    parent: BlockKey | None
    holder: str
    """`host:port` of the other pool's control server."""
    holder_epoch: Epoch
    timeout_s: Seconds


class Fetched(msgspec.Struct, frozen=True, tag=True):
    """Pool → router: the number of blocks of the chain, from its front, that are cached now."""

    num_blocks: int
    reason: str = ""
    """Why it is not the whole chain."""


class EvacuationTarget(msgspec.Struct, frozen=True):
    """A pool that may receive the blocks of an evacuated one."""

    name: str
    """Name of its instance, the same for all ranks, so that they choose alike."""
    address: str
    """`host:port` of its control server."""
    epoch: Epoch


class Evacuate(msgspec.Struct, frozen=True, tag=True):
    """Router → pool: your instance will stop; send `targets` the blocks that they lack, most recent first.

    Answered `Evacuated`, within `timeout_s` and the time that one step of an exchange may take.
    """

    layout: bytes
    targets: tuple[EvacuationTarget, ...]
    timeout_s: Seconds


class Evacuated(msgspec.Struct, frozen=True, tag=True):
    """Pool → router: the outcome of an evacuation."""

    num_sent: int
    num_bytes: int
    num_known: int
    """Blocks that one of the targets had before."""
    num_left: int
    """Blocks that are in no target, as far as the pool knows."""
    reason: str = ""
    """Why blocks are left."""


ToPool = Hello | Reserve | Commit | Cancel | Locate | AcquireLease | ReleaseLease | Fetch | Evacuate
FromPool = Welcome | Reserved | Declined | Committed | Located | Leased | Fetched | Evacuated
