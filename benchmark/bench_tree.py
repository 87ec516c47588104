"""Speed of the global prompt tree on one core, and its memory.

    python benchmark/bench_tree.py [--quick] [--blocks N ...] [--instances N ...] [--repeats N]

A prompt is 4,096 tokens in 256 blocks of 16: one of 16 system prompts of 32 blocks, that every instance
has, then a conversation of its own, in the HBM of one instance and, half of the time, in the DRAM of
another, further or less far. It is asked for with what is still unknown of the next turn, by keys that
were made anew. In the *staircase* each instance has another depth of one prompt.
Baselines, in the same run: a dict of key -> set of (instance, tier), walked block by block; and one set
of keys per instance and tier, bisected each, as a tree per instance would be. Figures are medians, in
seconds of the processor, so that others on the machine count less.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
import tracemalloc
from bisect import bisect_left
from collections.abc import Callable, Sequence

from figures import progress, report
from memserve.core.block_addr import Tier
from memserve.core.block_keys import BlockKey, page_keys
from memserve.core.cache_events import CacheEvent, Removed, Snapshot, Stored
from memserve.core.ids import Epoch, InstanceId
from memserve.scheduling.prompt_tree.records import NO_OVERLAP, Overlap
from memserve.scheduling.prompt_tree.tree import GlobalPromptTree

PAGE, BLOCKS, SYSTEM, NUM_SYSTEMS = 16, 256, 32, 16
SAMPLED = 1000
MOST_WITH_BASELINES = 2_000_000
"""Blocks: a dict of sets of more than that would not fit beside the tree."""
EPOCH = Epoch(1)
Holder = tuple[InstanceId, Tier]


class NaiveTree:
    """A naive tree: for each block, the set of its holders."""

    def __init__(self) -> None:
        self._holders: dict[BlockKey, set[Holder]] = {}

    def store(self, holder: Holder, keys: Sequence[BlockKey]) -> None:
        for key in keys:
            self._holders.setdefault(key, set()).add(holder)

    def remove(self, holder: Holder, keys: Sequence[BlockKey]) -> None:
        for key in keys:
            holders = self._holders.get(key)
            if holders is not None:
                holders.discard(holder)
                if not holders:
                    del self._holders[key]

    def depths(self, keys: Sequence[BlockKey]) -> dict[Holder, int]:
        depths: dict[Holder, int] = {}
        alive: set[Holder] | None = None
        for i, key in enumerate(keys):
            holders = self._holders.get(key)
            if not holders:
                break
            alive = holders if alive is None else alive & holders
            if not alive:
                break
            for holder in alive:
                depths[holder] = i + 1
        return depths


class TreePerInstance:
    """A set of keys for each holder; each is asked."""

    def __init__(self) -> None:
        self._keys: dict[Holder, set[BlockKey]] = {}

    def store(self, holder: Holder, keys: Sequence[BlockKey]) -> None:
        self._keys.setdefault(holder, set()).update(keys)

    def depths(self, keys: Sequence[BlockKey]) -> dict[Holder, int]:
        depths = {}
        for holder, held in self._keys.items():
            if keys[0] in held:
                depths[holder] = (
                    len(keys)
                    if keys[-1] in held
                    else bisect_left(keys, True, key=lambda key: key not in held)
                )
        return depths


class Cluster:
    """A tree of `num_blocks` blocks, and the same in the baselines if asked for."""

    def __init__(self, num_instances: int, num_blocks: int, *, baselines: bool = True) -> None:
        self.rng = random.Random(0)
        self.names = [InstanceId(f"instance-{n}") for n in range(num_instances)]
        self.sequences = dict.fromkeys(self.names, 0)
        self.tree = GlobalPromptTree(max_blocks=2 * num_blocks)
        self.naive, self.per_instance = NaiveTree(), TreePerInstance()
        self.baselines = baselines
        self.systems = [self.random_keys(SYSTEM) for _ in range(NUM_SYSTEMS)]
        for name in self.names:
            self.tree.join(name, EPOCH)
            for system in self.systems:
                self.store(name, Tier.HBM, system)
        num_chains = num_blocks // (BLOCKS - SYSTEM)
        self.sample: list[list[BlockKey]] = []
        for n in range(num_chains):
            keys = self.conversation()
            self.place(keys)
            if n % max(1, num_chains // SAMPLED) == 0:
                num_unknown = self.rng.choice([0, 4, 32])
                self.sample.append(copied(keys[: BLOCKS - num_unknown] + self.random_keys(num_unknown)))

    def random_keys(self, num: int) -> list[BlockKey]:
        data = self.rng.randbytes(32 * num)
        return [BlockKey(data[i : i + 32]) for i in range(0, len(data), 32)]

    def conversation(self) -> list[BlockKey]:
        return self.rng.choice(self.systems) + self.random_keys(BLOCKS - SYSTEM)

    def place(self, keys: list[BlockKey]) -> None:
        self.store(self.rng.choice(self.names), Tier.HBM, keys)
        if self.rng.random() < 0.5:
            other = self.rng.choice(self.names)
            self.store(other, Tier.DRAM, keys[: self.rng.choice([SYSTEM, 128, BLOCKS])])

    def event(self, name: InstanceId, tier: Tier, keys: Sequence[BlockKey]) -> Stored:
        self.sequences[name] += 1
        return Stored(self.sequences[name], tier, None, tuple(keys))

    def store(self, name: InstanceId, tier: Tier, keys: Sequence[BlockKey]) -> None:
        assert self.tree.apply(name, EPOCH, [self.event(name, tier, keys)])
        if self.baselines:
            self.naive.store((name, tier), keys)
            self.per_instance.store((name, tier), keys)


def copied(keys: Sequence[BlockKey]) -> list[BlockKey]:
    """Equal keys that are other objects, as those of a request are."""
    return [BlockKey(bytes(bytearray(key))) for key in keys]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, nargs="+", metavar="N")
    parser.add_argument("--instances", type=int, nargs="+", metavar="N")
    parser.add_argument("--repeats", type=int, metavar="N", help="(default: 7; --quick: 3)")
    parser.add_argument("--quick", action="store_true", help="200,000 blocks, 8 instances: half a minute")
    args = parser.parse_args()
    repeats = args.repeats or (3 if args.quick else 7)
    bench_memory()
    for num_instances in args.instances or ([8] if args.quick else [8, 1000]):
        for num_blocks in args.blocks or [200_000 if args.quick else 1_000_000]:
            progress(f"filling {num_blocks} blocks of {num_instances} instances")
            cluster = Cluster(num_instances, num_blocks, baselines=num_blocks <= MOST_WITH_BASELINES)
            where = f"{num_instances}_instances/{num_blocks}_blocks"
            bench_lookups(cluster, where, repeats)
            bench_decision(cluster, where)
            bench_events(cluster, where, repeats)
            bench_leave(cluster, where)
            del cluster
            gc.collect()
        bench_staircase(num_instances, repeats)


def bench_memory(num_blocks: int = 200_000) -> None:
    tracemalloc.start()
    cluster = Cluster(8, num_blocks, baselines=False)
    cluster.sample.clear()
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    report("micro/tree/garbage_collection/200000_blocks", [once(gc.collect) for _ in range(7)], "ms")
    report("micro/tree/memory_of_a_block/200000_blocks", [taken / cluster.tree.stats().blocks], "bytes")


def bench_lookups(cluster: Cluster, where: str, repeats: int) -> None:
    prompts = cluster.sample
    if not cluster.baselines:
        (taken,) = measure_together([over(cluster.tree.overlaps, prompts)], repeats)
        report(f"micro/tree/{where}/look_ups", rates(taken, len(prompts) * BLOCKS), "blocks/s")
        return
    for keys in prompts[:50]:
        check(cluster, keys)
    fns = [cluster.tree.overlaps, cluster.naive.depths, cluster.per_instance.depths]
    tree, naive, each = (
        rates(samples, len(prompts) * BLOCKS)
        for samples in measure_together([over(fn, prompts) for fn in fns], repeats)
    )
    report(f"micro/tree/{where}/look_ups/dict_of_sets", tree, "blocks/s", baseline=naive)
    report(f"micro/tree/{where}/look_ups/tree_per_instance", tree, "blocks/s", baseline=each)


def check(cluster: Cluster, keys: Sequence[BlockKey]) -> None:
    """Check that all three give the same result."""
    naive: dict[InstanceId, dict[Tier, int]] = {}
    for (name, tier), depth in cluster.naive.depths(keys).items():
        naive.setdefault(name, {})[tier] = depth
    assert cluster.naive.depths(keys) == cluster.per_instance.depths(keys)
    assert cluster.tree.overlaps(keys) == {
        name: Overlap((depths.get(Tier.HBM, 0), max(depths.values())), depths.get(Tier.DRAM, 0))
        for name, depths in naive.items()
    }


def bench_decision(cluster: Cluster, where: str) -> None:
    """Page keys of 4K tokens, depths, and a policy of one line; each prompt anew, one by one."""
    names = cluster.names
    queued = {name: cluster.rng.random() for name in names}
    prompts = []
    for n in range(400):
        tokens = cluster.rng.choices(range(100_000), k=BLOCKS * PAGE)
        prompts.append(tokens)
        if n % 4:
            keys = page_keys(tokens, PAGE)
            cluster.store(cluster.rng.choice(names), Tier.HBM, keys)
            for name in names:  # every instance has the system prompt
                cluster.store(name, Tier.HBM, keys[:SYSTEM])

    def decide(tokens: Sequence[int]) -> InstanceId:
        keys = page_keys(tokens, PAGE)
        get = cluster.tree.overlaps(keys).get
        return min(names, key=lambda name: queued[name] + BLOCKS - get(name, NO_OVERLAP).depths[-1])

    alone, taken = [], []
    for tokens in prompts:
        start = time.process_time()
        page_keys(tokens, PAGE)
        middle = time.process_time()
        decide(tokens)
        alone.append((middle - start) * 1e3)
        taken.append((time.process_time() - middle) * 1e3)
    report(f"micro/tree/{where}/decision", taken, "ms", baseline=alone)


def bench_events(cluster: Cluster, where: str, repeats: int) -> None:
    """New conversations of one instance; the same of a second one; and both gone, tails first."""
    rounds = [[cluster.conversation() for _ in range(200)] for _ in range(repeats)]
    first, second = cluster.names[0], cluster.names[-1]

    def steps(keys: list[BlockKey]) -> dict[str, tuple[InstanceId, Callable[[int], CacheEvent]]]:
        tail = tuple(reversed(keys[SYSTEM:]))
        return {
            "new blocks": (first, lambda n: Stored(n, Tier.HBM, None, tuple(keys))),
            "blocks another has": (second, lambda n: Stored(n, Tier.DRAM, None, tuple(keys))),
            "blocks removed that another has": (first, lambda n: Removed(n, Tier.HBM, tail)),
            "blocks removed": (second, lambda n: Removed(n, Tier.DRAM, tail)),
        }

    ours: dict[str, list[float]] = {}
    naives: dict[str, list[float]] = {}
    for chains in rounds:
        for what in steps(chains[0]):
            events = []
            for keys in chains:
                name, make = steps(keys)[what]
                cluster.sequences[name] += 1
                events.append(make(cluster.sequences[name]))
            num_blocks = sum(len(event.keys) for event in events)
            start = time.process_time()
            for event in events:
                cluster.tree.apply(name, EPOCH, [event])
            middle = time.process_time()
            for event in events if cluster.baselines else ():
                change = cluster.naive.store if isinstance(event, Stored) else cluster.naive.remove
                change((name, event.tier), event.keys)
            end = time.process_time()
            ours.setdefault(what, []).append(num_blocks / (middle - start))
            if cluster.baselines:
                naives.setdefault(what, []).append(num_blocks / (end - middle))
    for what, samples in ours.items():
        report(
            f"micro/tree/{where}/events/{what.replace(' ', '_')}",
            samples,
            "blocks/s",
            baseline=naives.get(what),
        )


def bench_leave(cluster: Cluster, where: str) -> None:
    """The instance with the most blocks leaves, and returns with a snapshot."""
    tree, name = cluster.tree, cluster.names[0]
    num_blocks = 1_000_000 // len(cluster.names)
    chains = [cluster.conversation() for _ in range(max(1, num_blocks // BLOCKS))]
    snapshot = Snapshot(1, tuple(Stored(0, Tier.HBM, None, tuple(keys)) for keys in chains))
    report(f"micro/tree/{where}/leave", [once(lambda: tree.leave(name))], "ms")
    tree.join(name, EPOCH)
    taken = once(lambda: tree.reset(name, EPOCH, snapshot))
    report(f"micro/tree/{where}/reset", [len(chains) * BLOCKS / taken * 1e3], "blocks/s")


def bench_staircase(num_instances: int, repeats: int) -> None:
    """The worst case: the holders change at every block."""
    cluster = Cluster(num_instances, 100_000)
    keys = cluster.conversation()
    for n, name in enumerate(cluster.names):
        cluster.store(name, (Tier.HBM, Tier.DRAM)[n % 2], keys[: 1 + n * BLOCKS // num_instances])
    asked = copied(keys)
    check(cluster, asked)
    tree, naive, each = (
        rates(samples, 20 * BLOCKS)
        for samples in measure_together(
            [
                over(fn, [asked] * 20)
                for fn in (cluster.tree.overlaps, cluster.naive.depths, cluster.per_instance.depths)
            ],
            repeats,
        )
    )
    where = f"{num_instances}_instances/staircase"
    report(f"micro/tree/{where}/look_ups/dict_of_sets", tree, "blocks/s", baseline=naive)
    report(f"micro/tree/{where}/look_ups/tree_per_instance", tree, "blocks/s", baseline=each)


def measure_together(fns: Sequence[Callable[[], None]], repeats: int) -> list[list[float]]:
    """As in `figures`, in processor time."""
    samples: list[list[float]] = [[] for _ in fns]
    for turn in range(1 + repeats):
        for fn, taken in zip(fns, samples, strict=True):
            elapsed = once(fn) / 1e3
            if turn:
                taken.append(elapsed)
    return samples


def over(fn: Callable[[Sequence[BlockKey]], object], prompts: Sequence[list[BlockKey]]) -> Callable[[], None]:
    def turn() -> None:
        for keys in prompts:
            fn(keys)

    return turn


def rates(samples: Sequence[float], num_blocks: int) -> list[float]:
    return [num_blocks / taken for taken in samples]


def once(fn: Callable[[], object]) -> float:
    """Milliseconds of processor time that one call takes."""
    start = time.process_time()
    fn()
    return (time.process_time() - start) * 1e3


if __name__ == "__main__":
    main()
