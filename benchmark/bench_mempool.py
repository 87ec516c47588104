"""How fast the pool's own bookkeeping is, single-threaded: allocation, keys, index, checksums.

    python benchmark/bench_mempool.py [--repeats N] [--cached N ...]

A prompt here is 4,096 tokens in 256 blocks of 16. Pools are filled with chains of 256 blocks, of
which `--cached` sizes are tried; no KV is moved but by the checksum, whose baseline is a memmove
of the same bytes. Figures are medians; the paper's, where it has them, are the baselines.
"""

from __future__ import annotations

import argparse
import ctypes
import random
import tracemalloc
from collections.abc import Callable

from figures import measure, measure_together, progress, report
from memserve.core.block_keys import BlockKey, page_keys
from memserve.core.ids import new_epoch
from memserve.core.kv_layout import KVLayout
from memserve.mempool.arena import Arena
from memserve.mempool.integrity import Checksum
from memserve.mempool.pool import MemPool

TOKENS, PAGE = 4096, 16
BLOCKS = TOKENS // PAGE
SMALLEST = KVLayout.of_heads("bookkeeping", 1, 1, 1, 1, ("int8", 1))
"""Blocks of a byte: a million of them fit anywhere."""
REAL = KVLayout.of_heads("bench", 8, PAGE, 4, 64, ("bfloat16", 2))
PAPER_ALLOC_NS, PAPER_INSERT_US = 800.0, 700.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--cached", type=int, nargs="+", default=[1_000, 100_000, 1_000_000])
    args = parser.parse_args()
    bench_keys(args.repeats)
    for num_blocks in (1, 16, 256):
        bench_alloc(num_blocks, args.repeats)
    for num_cached in args.cached:
        bench_index(num_cached, args.repeats)
    bench_checksum(args.repeats)


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
    for percent in (0, 50, 100):
        cut = BLOCKS * percent // 100
        queries = [[*rng.choice(whole)[:cut], *random_chain(rng, BLOCKS - cut)] for _ in range(repeats + 1)]
        turns = iter(queries * 2)
        report(
            f"match, {percent}% cached, {name}",
            microseconds(lambda t=turns: pool.match(next(t)), repeats),
            "us",
        )
        turns = iter(queries * 2)
        counted = microseconds(lambda t=turns: pool.num_cached(next(t)), repeats)
        report(f"num_cached, {percent}% cached, {name}", counted, "us")
    bench_insert(pool, name, repeats)
    bench_lease(pool, whole, name, repeats)
    bench_evict(pool, name, repeats)
    pool.arena.close()


def bench_insert(pool: MemPool, name: str, repeats: int) -> None:
    rng = random.Random(2)
    samples = []
    for _ in range(repeats + 1):
        keys, addrs = random_chain(rng, BLOCKS), pool.alloc_mem(BLOCKS)
        pool.seal(addrs)
        samples += measure(lambda k=keys, a=addrs: pool.insert(k, a), repeats=1, warmup=0)
        pool.delete(keys)
        pool.take_events()
    report(
        f"insert, 4K tokens, {name}",
        [1e6 * s for s in samples[1:]],
        "us",
        baseline=[PAPER_INSERT_US],
        target=1.0,
    )


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
    """Over more blocks than the caches hold, as blocks on their way to and from HBM are."""
    num_blocks = (256 << 20) // REAL.block_bytes
    arena = Arena(REAL.block_bytes, num_blocks)
    blocks = [arena.block(slot) for slot in range(num_blocks)]
    for slot, block in enumerate(blocks):
        block[:] = bytes([slot % 251]) * REAL.block_bytes
    checksum = Checksum(REAL)
    target = (ctypes.c_char * arena.num_bytes)()

    def copy() -> None:
        for slot in range(num_blocks):
            offset = arena.offset(slot)
            ctypes.memmove(ctypes.addressof(target) + offset, arena.address + offset, REAL.block_bytes)

    def check() -> None:
        for block in blocks:
            checksum.of(block)

    times = measure_together([check, copy], min(repeats, 7))
    summed, copied = ([arena.num_bytes / taken / 1e9 for taken in samples] for samples in times)
    report(f"checksum, {REAL.block_bytes >> 10} KiB blocks, against memmove", summed, "GB/s", baseline=copied)


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


def microseconds(fn: Callable[[], object], repeats: int) -> list[float]:
    return [1e6 * taken for taken in measure(fn, repeats)]


if __name__ == "__main__":
    main()
