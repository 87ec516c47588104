"""Speed of the pool's metadata operations, single-threaded, and of its block moves.

    python benchmark/bench_mempool.py [--quick] [--repeats N] [--cached N ...] [--local]

    micro/memory_api/alloc_free/16_at_a_time                ns a block; baseline: the paper's 800
    micro/index/match/100000_blocks/50_cached               us for 4,096 tokens, half of them cached
    micro/index/insert/100000_blocks, micro/index/{match,insert}/16_tokens_a_block, ...

and then bench_moving and bench_peers.

The figures between processes (bench_peers) come last; --local leaves them out. What the pool costs real
servers: bench_overheads.

A prompt here is 4,096 tokens in 256 blocks of 16. Pools are filled with chains of 256 blocks, of
which `--cached` sizes are tried. The baseline of insert and match is SGLang's radix tree with as many
of its own prompts, each a single node: its best case. (It compares tokens where the pool compares
keys, which have to be computed once: see page_keys.) The baseline of figures that move KV is a
memmove of the same bytes, block by block. Figures are medians.
"""

from __future__ import annotations

import argparse
import random
import tracemalloc
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle
from typing import TypeVar

import numpy as np

import bench_moving
import bench_peers
from bench_moving import random_chain
from figures import measure, measure_together, progress, report
from memserve.core.block_keys import BlockKey, page_keys
from memserve.core.ids import new_epoch
from memserve.core.kv_layout import KVLayout, Part
from memserve.mempool.arena import Arena
from memserve.mempool.pool import MemPool

T = TypeVar("T")

TOKENS, PAGE = 4096, 16
BLOCKS = TOKENS // PAGE
SMALLEST = KVLayout("bookkeeping", 1, 1, (Part(1, 1),) * 2, "int8", 1)
"""Blocks of a byte: a million of them fit anywhere."""
CACHED, QUICK_CACHED = (1_000, 10_000, 100_000, 1_000_000), (10_000, 100_000)
PAPER_ALLOC_NS = 800.0
PAPER_INSERT_US = 700.0
"""Of 4,096 tokens."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer repeats, pools and sizes: a minute")
    parser.add_argument("--repeats", type=int, metavar="N", help="(default: 21; --quick: 7)")
    parser.add_argument("--cached", type=int, nargs="+", metavar="N", help="blocks in the pools to try")
    parser.add_argument("--local", action="store_true", help="only what one process can measure")
    args = parser.parse_args()
    repeats = args.repeats or (7 if args.quick else 21)
    bench_keys(repeats)
    for num_blocks in (1, 16, 256):
        bench_alloc(num_blocks, repeats)
    for page in (4, 16, 64, 256):
        bench_block_size(page, repeats)
    for num_cached in args.cached or (QUICK_CACHED if args.quick else CACHED):
        bench_index(num_cached, repeats)
    repeats = min(repeats, 5 if args.quick else 7)
    bench_moving.run(repeats)
    if not args.local:
        bench_peers.run(repeats, quick=args.quick)


def bench_keys(repeats: int) -> None:
    tokens = random.Random(0).choices(range(100_000), k=TOKENS)
    report(
        "micro/index/page_keys/16_tokens_a_block",
        microseconds(lambda: page_keys(tokens, PAGE), repeats),
        "us",
    )


def bench_alloc(num_blocks: int, repeats: int) -> None:
    pool = MemPool(SMALLEST, Arena(SMALLEST.block_bytes, 4096), new_epoch())
    rounds = max(1, 2048 // num_blocks)

    def turn() -> None:
        for _ in range(rounds):
            pool.free_mem(pool.alloc_mem(num_blocks))

    samples = [taken / rounds / num_blocks * 1e9 for taken in measure(turn, repeats)]
    report(
        f"micro/memory_api/alloc_free/{num_blocks}_at_a_time",
        samples,
        "ns",
        baseline=[PAPER_ALLOC_NS],
        target=1.0,
    )


def bench_block_size(page: int, repeats: int) -> None:
    """Keys, insert and match of 4,096 tokens in blocks of `page`, in a pool of 25 such prompts."""
    rng, count = random.Random(5), TOKENS // page
    pool = MemPool(SMALLEST, Arena(SMALLEST.block_bytes, (32 + repeats) * count), new_epoch())
    tokens = rng.choices(range(100_000), k=TOKENS)
    if page != PAGE:
        report(
            f"micro/index/page_keys/{page}_tokens_a_block",
            microseconds(lambda: page_keys(tokens, page), repeats),
            "us",
        )
    inserted = []
    for number in range(repeats + 25):
        keys, addrs = random_chain(rng, count), pool.alloc_mem(count)
        pool.seal(addrs)
        inserted += measure(partial(pool.insert, keys, addrs), repeats=1, warmup=0)
        if number < 25:
            known = keys
        pool.take_events()
    name = f"{page}_tokens_a_block"
    report_us(f"micro/index/insert/{name}", inserted[25:], [PAPER_INSERT_US / 1e6])
    report_us(f"micro/index/match/{name}", measure(lambda: pool.match(known), repeats))
    pool.arena.close()


def bench_index(num_cached: int, repeats: int) -> None:
    """One pool with so many blocks cached, and room for a few prompts more."""
    progress(f"filling a pool with {num_cached} blocks ...")
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    num_slots = num_cached + (4 + repeats) * BLOCKS
    pool = MemPool(SMALLEST, Arena(SMALLEST.block_bytes, num_slots), new_epoch())
    chains = fill(pool, num_cached)
    pool.take_events()
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    name = f"{num_cached}_blocks"
    report(
        f"micro/index/metadata_of_a_slot/{name}", [used / num_slots], "bytes", baseline=[300.0], target=1.0
    )

    rng = random.Random(1)
    whole = [chain for chain in chains if len(chain) == BLOCKS]
    tree = SGLangTree(len(whole))
    for percent in (0, 25, 50, 75, 100):
        cut = BLOCKS * percent // 100
        queries = [[*rng.choice(whole)[:cut], *random_chain(rng, BLOCKS - cut)] for _ in range(repeats + 1)]
        match, count = each(pool.match, queries), each(pool.num_cached, queries)
        theirs = each(tree.match, list(tree.prompts(repeats + 1, TOKENS * percent // 100)))
        report_us(f"micro/index/match/{name}/{percent}_cached", *measure_together([match, theirs], repeats))
        report_us(f"micro/index/num_cached/{name}/{percent}_cached", measure(count, repeats))
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
        ours += measure(partial(pool.insert, keys, addrs), repeats=1, warmup=0)
        theirs += measure(partial(tree.insert, prompt), repeats=1, warmup=0)
        pool.take_events()
    report_us(f"micro/index/insert/{name}", ours[1:], theirs[1:])


def bench_lease(pool: MemPool, chains: list[list[BlockKey]], name: str, repeats: int) -> None:
    match = pool.match(random.Random(3).choice(chains))
    report(
        f"micro/index/acquire_release/{name}",
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
        report(f"micro/memory_api/alloc_by_eviction/{name}", [1e9 * s / BLOCKS for s in samples], "ns")
    pool.free_mem(held)


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


def each(fn: Callable[[T], object], arguments: Sequence[T]) -> Callable[[], object]:
    """A function that calls `fn` with the next of the arguments, from the first after the last."""
    turns = cycle(arguments)
    return lambda: fn(next(turns))


def microseconds(fn: Callable[[], object], repeats: int) -> list[float]:
    return [1e6 * taken for taken in measure(fn, repeats)]


def report_us(name: str, seconds: Sequence[float], baseline: Sequence[float] | None = None) -> None:
    report(name, [1e6 * s for s in seconds], "us", baseline=baseline and [1e6 * s for s in baseline])


if __name__ == "__main__":
    main()
