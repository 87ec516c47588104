"""What memory pools of different processes say to each other. Joined to all others in `messages`."""

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
    """Pool → pool: I would write the blocks of this chain that you lack. Answered `Reserved`, `Declined`.

    keys[0] comes after `parent`, or begins a prompt. `transfer_id` is the sender's, never used twice;
    a repeated request gets the same answer. `Unknown`, here and below: say Hello first.
    """

    epoch: Epoch
    transfer_id: int
    layout: bytes
    """Digest."""
    keys: tuple[BlockKey, ...]
    parent: BlockKey | None


class Reserved(msgspec.Struct, frozen=True, tag=True):
    """Pool → pool: write here, then commit or cancel."""

    num_known: int
    """So many blocks, from the front of the chain, are here already."""
    addrs: tuple[int, ...]
    """`BlockAddr` of a slot for each block after those."""


class Declined(msgspec.Struct, frozen=True, tag=True):
    """Pool → pool: not now; nothing has changed here."""

    reason: str
    parent_unknown: bool = False
    """Send the chain from its root and it may be taken."""


class Commit(msgspec.Struct, frozen=True, tag=True):
    """Pool → pool: all bytes of the reservation are in place. Answered `Committed`, `Declined`."""

    epoch: Epoch
    transfer_id: int
    checksums: tuple[int, ...]
    """Of each block written, in the order of the reserved addresses."""


class Committed(msgspec.Struct, frozen=True, tag=True):
    """Pool → pool: so many blocks are in the index that were not."""

    num_new: int


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Pool → pool: the reservation will not be committed. Answered `Done`, also when it is unknown."""

    epoch: Epoch
    transfer_id: int
    settled: bool
    """No byte of mine can land any more; else the blocks stay in quarantine."""


class Locate(msgspec.Struct, frozen=True, tag=True):
    """Anyone → pool: how much of this chain do you hold? Answered `Located`."""

    layout: bytes
    keys: tuple[BlockKey, ...]


class Located(msgspec.Struct, frozen=True, tag=True):
    """Pool → anyone: so many blocks, from the front."""

    num_blocks: int
    num_free: int = 0
    """Blocks of that layout that nothing is in."""
    num_evictable: int = 0
    """Cached blocks that could make room for others."""


class AcquireLease(msgspec.Struct, frozen=True, tag=True):
    """Pool → pool: hold these while I read them. Answered `Leased`, an empty one if none is there."""

    epoch: Epoch
    lease_id: int
    """The reader's, never used twice; a repeated request gets the same answer."""
    layout: bytes
    keys: tuple[BlockKey, ...]


class Leased(msgspec.Struct, frozen=True, tag=True):
    """Pool → pool: where the longest prefix that is here can be read, and what its bytes sum to."""

    addrs: tuple[int, ...]
    checksums: tuple[int, ...]


class ReleaseLease(msgspec.Struct, frozen=True, tag=True):
    """Pool → pool: I have read them. Answered `Done`, also when the lease is unknown or has run out."""

    epoch: Epoch
    lease_id: int


class Fetch(msgspec.Struct, frozen=True, tag=True):
    """Router → pool: get what you lack of this chain from `holder`. Answered `Fetched`."""

    layout: bytes
    keys: tuple[BlockKey, ...]
    parent: BlockKey | None
    holder: str
    """`host:port` of the other pool's control server."""
    holder_epoch: Epoch
    timeout_s: Seconds


class Fetched(msgspec.Struct, frozen=True, tag=True):
    """Pool → router: so many blocks of the chain, from the front, are here now."""

    num_blocks: int
    reason: str = ""
    """Why it is not all of them."""


class EvacuationTarget(msgspec.Struct, frozen=True):
    """A pool that may take in what another one evacuates."""

    name: str
    """Of its instance, the same for all ranks: they choose alike."""
    address: str
    """`host:port` of its control server."""
    epoch: Epoch


class Evacuate(msgspec.Struct, frozen=True, tag=True):
    """Router → pool: you are about to go, so send what these pools lack of what you hold, hottest first.

    Answered `Evacuated`, within `timeout_s` and the time that one step of an exchange may take.
    """

    layout: bytes
    targets: tuple[EvacuationTarget, ...]
    timeout_s: Seconds


class Evacuated(msgspec.Struct, frozen=True, tag=True):
    """Pool → router: what has become of my blocks."""

    num_sent: int
    num_bytes: int
    num_known: int
    """Blocks that one of the others had already."""
    num_left: int
    """Blocks that are nowhere else, as far as I know."""
    reason: str = ""
    """Why blocks are left."""


ToPool = Hello | Reserve | Commit | Cancel | Locate | AcquireLease | ReleaseLease | Fetch | Evacuate
FromPool = Welcome | Reserved | Declined | Committed | Located | Leased | Fetched | Evacuated
