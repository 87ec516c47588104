"""How fast the pool's own bookkeeping is, single-threaded, and how fast it moves blocks.

    python benchmark/bench_mempool.py [--repeats N] [--cached N ...] [--local]

The figures between processes (bench_peers) come last; --local leaves them out. What the pool costs real
servers: bench_overheads.

A prompt here is 4,096 tokens in 256 blocks of 16. Pools are filled with chains of 256 blocks, of
which `--cached` sizes are tried. The baseline of insert and match is SGLang's radix tree with as many
of its own prompts, each a single node: its best case. (It compares tokens where the pool compares
keys, which somebody has to compute once: see page_keys.) The baseline of whatever moves KV is a
memmove of the same bytes, block by block. Figures are medians.
"""

from __future__ import annotations

import argparse
import ctypes
import random
import tracemalloc
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from types import SimpleNamespace
from typing import TypeVar

import numpy as np

import bench_peers
from figures import measure, measure_together, progress, report
from memserve.core.block_addr import Tier
from memserve.core.block_keys import BlockKey, page_keys
from memserve.core.ids import new_epoch
from memserve.core.kv_layout import KVLayout
from memserve.mempool.arena import Arena
from memserve.mempool.integrity import Checksum
from memserve.mempool.pool import MemPool

T = TypeVar("T")

TOKENS, PAGE = 4096, 16
BLOCKS = TOKENS // PAGE
SMALLEST = KVLayout.of_heads("bookkeeping", 1, 1, 1, 1, ("int8", 1))
"""Blocks of a byte: a million of them fit anywhere."""
REAL = KVLayout.of_heads("bench", 6, PAGE, 2, 64, ("float32", 4))
"""Of `scripts/make_tiny_model.py --size bench`: 96 KiB a block."""
PAPER_ALLOC_NS = 800.0
MOVED_BLOCKS = (192 << 20) // REAL.block_bytes
"""More than the caches hold, as blocks on their way to and from HBM are."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--cached", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--local", action="store_true", help="only what one process can measure")
    args = parser.parse_args()
    bench_keys(args.repeats)
    for num_blocks in (1, 16, 256):
        bench_alloc(num_blocks, args.repeats)
    for num_cached in args.cached:
        bench_index(num_cached, args.repeats)
    repeats = min(args.repeats, 7)
    bench_checksum(repeats)
    bench_swap(repeats)
    bench_resize(repeats)
    bench_kv_blocks(repeats)
    if not args.local:
        bench_peers.run(repeats)


def bench_keys(repeats: int) -> None:
    tokens = random.Random(0).choices(range(100_000), k=TOKENS)
    report("page_keys, 4K tokens", microseconds(lambda: page_keys(tokens, PAGE), repeats), "us")


def bench_alloc(num_blocks: int, repeats: int) -> None:
    pool = MemPool(SMALLEST, Arena(SMALLEST.block_bytes, 4096), new_epoch())
    rounds = max(1, 2048 // num_blocks)

    def turn() -> None:
        for _ in range(rounds):
            pool.free_mem(pool.alloc_mem(num_blocks))

    samples = [taken / rounds / num_blocks * 1e9 for taken in measure(turn, repeats)]
    report(
        f"alloc + free per block, {num_blocks} at a time",
        samples,
        "ns",
        baseline=[PAPER_ALLOC_NS],
        target=1.0,
    )


def bench_index(num_cached: int, repeats: int) -> None:
    """One pool with so many blocks cached, and room for a few prompts more."""
    progress(f"filling a pool with {num_cached} blocks ...")
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    num_slots = num_cached + 4 * BLOCKS
    pool = MemPool(SMALLEST, Arena(SMALLEST.block_bytes, num_slots), new_epoch())
    chains = fill(pool, num_cached)
    pool.take_events()
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    name = f"{num_cached} blocks cached"
    report(f"metadata per slot, {name}", [used / num_slots], "bytes", baseline=[300.0], target=1.0)

    rng = random.Random(1)
    whole = [chain for chain in chains if len(chain) == BLOCKS]
    tree = SGLangTree(len(whole))
    for percent in (0, 50, 100):
        cut = BLOCKS * percent // 100
        queries = [[*rng.choice(whole)[:cut], *random_chain(rng, BLOCKS - cut)] for _ in range(repeats + 1)]
        match, count = each(pool.match, queries), each(pool.num_cached, queries)
        theirs = each(tree.match, list(tree.prompts(repeats + 1, TOKENS * percent // 100)))
        report_us(f"match, {percent}% cached, {name}", *measure_together([match, theirs], repeats))
        report_us(f"num_cached, {percent}% cached, {name}", measure(count, repeats))
    bench_insert(pool, tree, name, repeats)
    bench_lease(pool, whole, name, repeats)
    bench_evict(pool, name, repeats)
    pool.arena.close()


def bench_insert(pool: MemPool, tree: SGLangTree, name: str, repeats: int) -> None:
    rng = random.Random(2)
    ours, theirs = [], []
    for _ in range(repeats + 1):
        keys, addrs, (prompt,) = random_chain(rng, BLOCKS), pool.alloc_mem(BLOCKS), tree.prompts(1, 0)
        pool.seal(addrs)
        ours += measure(lambda k=keys, a=addrs: pool.insert(k, a), repeats=1, warmup=0)
        theirs += measure(lambda p=prompt: tree.insert(p), repeats=1, warmup=0)
        pool.delete(keys)
        pool.take_events()
    report_us(f"insert, 4K tokens, {name}", ours[1:], theirs[1:])


def bench_lease(pool: MemPool, chains: list[list[BlockKey]], name: str, repeats: int) -> None:
    match = pool.match(random.Random(3).choice(chains))
    report(
        f"acquire + release, 4K tokens, {name}",
        microseconds(lambda: pool.release(pool.acquire(match)), repeats),
        "us",
    )


def bench_evict(pool: MemPool, name: str, repeats: int) -> None:
    """A full pool: every allocation has to evict as much. 256 blocks at a time."""
    stats = pool.stats()
    held = pool.alloc_mem(stats.free)
    taken = []
    samples = []
    for _ in range(min(repeats, stats.cached // BLOCKS)):
        samples += measure(lambda: taken.append(pool.alloc_mem(BLOCKS)), repeats=1, warmup=0)
    if samples:
        report(f"alloc by eviction per block, {name}", [1e9 * s / BLOCKS for s in samples], "ns")
    pool.free_mem(held)


def bench_checksum(repeats: int) -> None:
    arena = filled_arena(MOVED_BLOCKS)
    checksum = Checksum(REAL)
    blocks = [arena.block(slot) for slot in range(MOVED_BLOCKS)]
    target = bytearray(arena.num_bytes)

    def check() -> None:
        for block in blocks:
            checksum.of(block)

    times = measure_together([check, lambda: move(arena, target)], repeats)
    report_rate(f"checksum, {REAL.block_bytes >> 10} KiB blocks", arena.num_bytes, *times)


def bench_swap(repeats: int) -> None:
    """Whole prompts, from one tier to the other and back, checksums included."""
    hbm, dram = filled_arena(MOVED_BLOCKS), Arena(REAL.block_bytes, MOVED_BLOCKS)
    pool = MemPool(REAL, dram, new_epoch(), hbm=hbm)
    rng = random.Random(4)
    target = bytearray(hbm.num_bytes)
    swapped_out, swapped_in, moved = [], [], []
    for _ in range(repeats + 1):
        pool.clear()
        chains = [random_chain(rng, BLOCKS) for _ in range(MOVED_BLOCKS // BLOCKS)]
        for keys in chains:
            addrs = pool.alloc_mem(BLOCKS, Tier.HBM)
            pool.seal(addrs)
            pool.insert(keys, addrs)
        swapped_out += measure(lambda: pool.swap_out(MOVED_BLOCKS), 1, warmup=0)
        places = [pool.match(keys).addrs for keys in chains]
        swapped_in += measure(lambda p=places: [pool.swap_in(addrs) for addrs in p], 1, warmup=0)
        moved += measure(lambda: move(hbm, target), 1, warmup=0)
    report_rate("swap_out", hbm.num_bytes, swapped_out[1:], moved[1:])
    report_rate("swap_in", hbm.num_bytes, swapped_in[1:], moved[1:])


def bench_resize(repeats: int) -> None:
    """To half the size, with that much to move; and back, with nothing to move."""
    arena = Arena(REAL.block_bytes, 2 * MOVED_BLOCKS)
    pool = MemPool(REAL, arena, new_epoch())
    half = arena.slot_bytes * MOVED_BLOCKS
    target = bytearray(arena.num_bytes)
    shrunk, grown, moved = [], [], []
    for turn in range(repeats + 1):
        pool.clear()
        filler = pool.alloc_mem(MOVED_BLOCKS)
        rng = random.Random(turn)
        for _ in range(MOVED_BLOCKS // BLOCKS):
            addrs = pool.alloc_mem(BLOCKS)
            pool.seal(addrs)
            pool.insert(random_chain(rng, BLOCKS), addrs)
        pool.free_mem(filler)
        moved += measure(lambda: move(arena, target, MOVED_BLOCKS), 1, warmup=0)
        shrunk += measure(lambda: pool.resize(MOVED_BLOCKS), 1, warmup=0)
        pool.clear()
        grown += measure(lambda: pool.resize(2 * MOVED_BLOCKS), 1, warmup=0)
    report_rate("resize, shrinking over cached blocks", half, shrunk[1:], moved[1:])
    report_rate("resize, growing", half, grown[1:], moved[1:])


def bench_kv_blocks(repeats: int) -> None:
    """What the engine does between HBM and the pool: pages in any order, a layer at a time, one thread."""
    import torch

    from memserve.engine.kv_blocks import KVBlocks

    torch.set_num_threads(1)
    heads, width = REAL.parts[0]
    shape = (MOVED_BLOCKS * PAGE, heads, width)
    k_buffer, v_buffer = (
        [torch.ones(shape, dtype=torch.float32) for _ in range(REAL.num_layers)] for _ in "kv"
    )
    arena = filled_arena(MOVED_BLOCKS)
    blocks = KVBlocks(SimpleNamespace(k_buffer=k_buffer, v_buffer=v_buffer), REAL, arena)
    order = torch.randperm(MOVED_BLOCKS, generator=torch.Generator().manual_seed(0))
    pages = blocks.pages((order[:, None] * PAGE + torch.arange(PAGE)).flatten())
    slots = list(range(MOVED_BLOCKS))
    target = bytearray(arena.num_bytes)

    def load_back() -> None:
        for start in range(0, MOVED_BLOCKS, BLOCKS):
            for layer in range(REAL.num_layers):
                some = slice(start, start + BLOCKS)
                blocks.load_layer(layer, slots[some], pages[some])

    pack, load, moved = measure_together(
        [lambda: blocks.pack(slots, pages), load_back, lambda: move(arena, target)], repeats
    )
    report_rate("offload (KVBlocks.pack)", arena.num_bytes, pack, moved, target=0.5)
    report_rate(
        "load back (KVBlocks.load_layer), 4K tokens at a time", arena.num_bytes, load, moved, target=0.5
    )


class SGLangTree:
    """SGLang's own radix tree, with prompts of 4K tokens in it; none of it holds any KV."""

    def __init__(self, num_prompts: int) -> None:
        import torch
        from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
        from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey

        self._key, self._insert, self._match = RadixKey, InsertParams, MatchPrefixParams
        self._slots = torch.arange(TOKENS)
        self._rng = np.random.default_rng(0)
        self._cache = RadixCache.create_simulated(page_size=PAGE)
        self._cached: list[array[int]] = []
        for prompt in self.prompts(num_prompts, 0):
            self.insert(prompt)
            self._cached.append(prompt)

    def prompts(self, count: int, num_cached: int) -> Iterator[array[int]]:
        """Prompts of which so many tokens are in the tree."""
        for _ in range(count):
            fresh = array("q", self._rng.integers(0, 100_000, TOKENS).tobytes())
            known = self._cached[self._rng.integers(len(self._cached))] if num_cached else fresh
            yield known[:num_cached] + fresh[num_cached:]

    def insert(self, prompt: array[int]) -> None:
        self._cache.insert(self._insert(key=self._key(prompt), value=self._slots))

    def match(self, prompt: array[int]) -> None:
        self._cache.match_prefix(self._match(key=self._key(prompt)))


def filled_arena(num_blocks: int) -> Arena:
    """Blocks that differ, resident and read once."""
    arena = Arena(REAL.block_bytes, num_blocks)
    for slot in range(num_blocks):
        arena.block(slot)[:] = bytes([slot % 251]) * REAL.block_bytes
    return arena


def move(arena: Arena, target: bytearray, num_blocks: int | None = None) -> None:
    """The baseline: so many blocks out of an arena (default: all), one memmove each."""
    place = ctypes.addressof(ctypes.c_char.from_buffer(target))
    for slot in range(arena.num_slots if num_blocks is None else num_blocks):
        offset = arena.offset(slot)
        ctypes.memmove(place + offset, arena.address + offset, arena.block_bytes)


def fill(pool: MemPool, num_blocks: int) -> list[list[BlockKey]]:
    """Cache that many blocks, in chains of up to 256; returns their keys."""
    rng = random.Random(0)
    chains = []
    while num_blocks:
        keys = random_chain(rng, min(BLOCKS, num_blocks))
        addrs = pool.alloc_mem(len(keys))
        pool.seal(addrs)
        pool.insert(keys, addrs)
        num_blocks -= len(keys)
        chains.append(keys)
        if len(chains) % 64 == 0:
            pool.take_events()
    return chains


def random_chain(rng: random.Random, length: int) -> list[BlockKey]:
    """Keys as of a prompt nobody has seen."""
    return [BlockKey(rng.randbytes(32)) for _ in range(length)]


def each(fn: Callable[[T], object], arguments: Sequence[T]) -> Callable[[], object]:
    """A function that calls `fn` with the next of the arguments, from the first after the last."""
    turns = cycle(arguments)
    return lambda: fn(next(turns))


def microseconds(fn: Callable[[], object], repeats: int) -> list[float]:
    return [1e6 * taken for taken in measure(fn, repeats)]


def report_us(name: str, seconds: Sequence[float], baseline: Sequence[float] | None = None) -> None:
    report(name, [1e6 * s for s in seconds], "us", baseline=baseline and [1e6 * s for s in baseline])


def report_rate(
    name: str,
    num_bytes: int,
    seconds: Sequence[float],
    baseline: Sequence[float],
    *,
    target: float | None = None,
) -> None:
    rates = ([num_bytes / taken / 1e9 for taken in samples] for samples in (seconds, baseline))
    report(f"{name}, against memmove", next(rates), "GB/s", baseline=next(rates), target=target)


if __name__ == "__main__":
    main()
