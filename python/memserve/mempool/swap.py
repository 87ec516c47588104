"""Cached blocks on their way between HBM and DRAM: keys and bytes stay, places change.

    swap_out   choose victims -> copy, sum      -> index in DRAM, take out of HBM
    swap_in    lease          -> copy, check    -> index in HBM; DRAM keeps its copy

Each tier is prefix-closed by itself: with a prompt's tail DRAM gets what it lacks of its head, which
is then in both tiers and leaves HBM for nothing. Bytes move outside the lock; what changed meanwhile
is seen afterwards, and tried again. Knows no leases and no addresses of others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memserve.core.block_addr import BlockAddr
from memserve.core.errors import BlockStateError, OutOfBlocks
from memserve.mempool.allocator import PRIVATE, Slots
from memserve.mempool.index import CachedNode
from memserve.mempool.tier_pool import TierPool


@dataclass(frozen=True, slots=True)
class _Chain:
    """Blocks, each after the one before it, being copied from slots of one tier to slots of the other."""

    nodes: Sequence[CachedNode]
    sources: Sequence[int]
    targets: Slots

    def num_in_place(self, tier: TierPool) -> int:
        """How many, from the front, are where they were when they were chosen."""
        at = tier.cache.index.at
        for i, (node, slot) in enumerate(zip(self.nodes, self.sources, strict=True)):
            if at(slot) is not node:
                return i
        return len(self.nodes)


@dataclass(frozen=True, slots=True)
class _Departure:
    """Blocks that are to leave HBM, and what DRAM lacks of the prompts that they end."""

    victims: dict[CachedNode, int]
    """And where they are in HBM; children before their parents."""
    chains: Sequence[_Chain]
    """What DRAM lacks. A chain's parent is in DRAM or in a chain before it."""
    anchors: Sequence[CachedNode]
    """DRAM's blocks before the chains, pinned until it is over."""


def swap_out(hbm: TierPool, dram: TierPool, num_blocks: int) -> list[BlockAddr]:
    """See MemPool."""
    while True:
        with hbm.lock:
            departure = _choose(hbm, dram, num_blocks)
        sums = [_copy_out(hbm, dram, chain) for chain in departure.chains]
        with hbm.lock:
            for chain, chain_sums in zip(departure.chains, sums, strict=True):
                top, stayed = chain.nodes[0].parent, chain.num_in_place(hbm)
                keys = [node.key for node in chain.nodes[:stayed]]
                dram.adopt(keys, chain.targets, chain_sums, None if top is None else top.key)
            for node in departure.anchors:
                dram.cache.unpin(node)
            found = [dram.cache.index.tree.get(node.key) for node in departure.victims]
            if _may_leave(hbm, departure.victims) and all(found):
                hbm.cache.forget(list(departure.victims))
                return [BlockAddr(dram.first + node.payload) for node in found if node is not None]


def swap_in(hbm: TierPool, dram: TierPool, addrs: Sequence[BlockAddr]) -> list[BlockAddr]:
    """See MemPool."""
    slots = dram.slots(addrs).tolist()
    with hbm.lock:
        nodes = _chain_at(dram, slots)
        if not nodes:
            return []
        keys = [node.key for node in nodes]
        above = nodes[0].parent
        parent = None if above is None else above.key
        tree = hbm.cache.index.tree
        known = tree.depth(keys)
        anchor = keys[known - 1] if known else parent
        before = None if anchor is None else tree.get(anchor)
        if anchor is not None and before is None:
            raise BlockStateError("what comes before a block is not in HBM")
        held = [(tier, node) for tier, node in ((dram, nodes[-1]), (hbm, before)) if node is not None]
        for tier, node in held:
            tier.cache.index.pin(node)
        try:
            targets = hbm.cache.take(len(nodes) - known, PRIVATE)
        except OutOfBlocks:
            for tier, node in held:
                tier.cache.unpin(node)
            raise
        chain = _Chain(nodes[known:], slots[known:], targets)
    good = _copy_in(hbm, dram, chain)
    with hbm.lock:
        good = min(good, chain.num_in_place(dram))
        hbm.adopt(keys[known : known + good], targets, [0] * good, anchor)
        found = tree.match(keys[: known + good])
        for tier, node in held:
            tier.cache.unpin(node)
    return [BlockAddr(hbm.first + node.payload) for node in found]


def _choose(hbm: TierPool, dram: TierPool, num_blocks: int) -> _Departure:
    """Raises OutOfBlocks, changing nothing."""
    victims = hbm.cache.index.victims(num_blocks)
    if len(victims) < num_blocks:
        raise OutOfBlocks(num_blocks, 0, len(victims))
    tree = dram.cache.index.tree
    lacking: set[CachedNode] = set()
    paths, anchors = [], []
    for victim in victims:
        path: list[CachedNode] = []
        node: CachedNode | None = victim
        while node is not None and node not in lacking and node.key not in tree:
            path.append(node)
            node = node.parent
        lacking.update(path)
        anchor = None if node is None else tree.get(node.key)
        if anchor is not None:
            dram.cache.index.pin(anchor)
            anchors.append(anchor)
        if path:
            paths.append(path[::-1])
    try:
        targets = dram.cache.take(len(lacking), PRIVATE)
    except OutOfBlocks:
        for anchor in anchors:
            dram.cache.unpin(anchor)
        raise
    chains = []
    for path in paths:
        mine, targets = targets[: len(path)], targets[len(path) :]
        chains.append(_Chain(path, [node.payload for node in path], mine))
    return _Departure({node: node.payload for node in victims}, chains, anchors)


def _copy_out(hbm: TierPool, dram: TierPool, chain: _Chain) -> list[int]:
    """Copy a chain's bytes to DRAM; returns the checksums that they carry from now on."""
    sums = []
    for source, target in zip(chain.sources, chain.targets.tolist(), strict=True):
        block = hbm.arena.block(source)
        sums.append(dram.checksum_of(block))
        dram.arena.block(target)[:] = block
    return sums


def _copy_in(hbm: TierPool, dram: TierPool, chain: _Chain) -> int:
    """Copy a chain's bytes to HBM, up to the first block that is corrupt there; returns how many."""
    sums = dram.sums[list(chain.sources)].tolist()
    for i, (source, target) in enumerate(zip(chain.sources, chain.targets.tolist(), strict=True)):
        block = hbm.arena.block(target)
        block[:] = dram.arena.block(source)
        if dram.checksum_of(block) != sums[i]:
            dram.condemn(chain.nodes[i].key, source)
            return i
    return len(chain.nodes)


def _may_leave(hbm: TierPool, victims: dict[CachedNode, int]) -> bool:
    """Whether all of them are where they were, with no lease, and with nothing new after them."""
    index = hbm.cache.index
    return all(
        index.at(slot) is node and not index.is_pinned(node) and node.is_leaf_without(victims)
        for node, slot in victims.items()
    )


def _chain_at(dram: TierPool, slots: Sequence[int]) -> list[CachedNode]:
    """The blocks cached in these slots. Raises BlockStateError if one is not, or they are no chain."""
    nodes: list[CachedNode] = []
    for slot in slots:
        node = dram.cache.index.at(slot) if 0 <= slot < dram.arena.num_slots else None
        if node is None:
            raise BlockStateError("a block is not cached in DRAM")
        if nodes and node.parent is not nodes[-1]:
            raise BlockStateError("a block does not come after the one before it")
        nodes.append(node)
    return nodes
