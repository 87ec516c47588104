"""GlobalPromptTree against a dict of sets, with events lost, doubled, reordered and forged."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from memserve.core.block_addr import Tier
from memserve.core.block_keys import BlockKey, page_keys
from memserve.core.cache_events import CacheEvent, Removed, Snapshot, Stored
from memserve.core.ids import Epoch, InstanceId
from memserve.scheduling.prompt_tree.records import Overlap
from memserve.scheduling.prompt_tree.tree import GlobalPromptTree

Prompt = tuple[int, ...]
"""One block per token; each prefix is a block."""

NAMES = [InstanceId(name) for name in ("ann", "bob", "cyd")]
TIERS = [Tier.HBM, Tier.DRAM]
names = st.sampled_from(NAMES)
tiers = st.sampled_from(TIERS)
often = st.integers(0, 3)
prompts = st.lists(st.integers(0, 1), min_size=1, max_size=9).map(tuple)


def keys_of(prompt: Prompt) -> list[BlockKey]:
    return page_keys(prompt, 1)


def key_of(prompt: Prompt) -> BlockKey:
    return keys_of(prompt)[-1]


def prefixes(prompt: Prompt) -> list[Prompt]:
    return [prompt[:n] for n in range(1, len(prompt) + 1)]


def leading(prompt: Prompt, among: Iterable[Prompt]) -> int:
    known = set(among)
    depth = 0
    while depth < len(prompt) and prompt[: depth + 1] in known:
        depth += 1
    return depth


def nothing() -> dict[Tier, set[Prompt]]:
    return {tier: set() for tier in TIERS}


@dataclass
class Pool:
    """The true blocks of an instance, and every event it has sent with the blocks that it changed."""

    epoch: Epoch
    held: dict[Tier, set[Prompt]] = field(default_factory=nothing)
    log: list[tuple[CacheEvent, set[Prompt]]] = field(default_factory=list)
    snapshots: list[tuple[Snapshot, dict[Tier, set[Prompt]]]] = field(default_factory=list)

    def store(self, tier: Tier, prompt: Prompt) -> None:
        missing = [one for one in prefixes(prompt) if one not in self.held[tier]]
        if missing:
            parent = key_of(missing[0][:-1]) if len(missing[0]) > 1 else None
            event = Stored(len(self.log) + 1, tier, parent, tuple(map(key_of, missing)))
            self.log.append((event, set(missing)))
            self.held[tier] |= set(missing)

    def remove(self, tier: Tier, top: Prompt) -> None:
        gone = sorted((one for one in self.held[tier] if one[: len(top)] == top), key=len, reverse=True)
        self.log.append((Removed(len(self.log) + 1, tier, tuple(map(key_of, gone))), set(gone)))
        self.held[tier] -= set(gone)

    def snapshot(self) -> Snapshot:
        chains = []
        for tier, held in self.held.items():
            for one in sorted(held):
                parent = key_of(one[:-1]) if len(one) > 1 else None
                chains.append(Stored(0, tier, parent, (key_of(one),)))
        snapshot = Snapshot(len(self.log), tuple(chains))
        self.snapshots.append((snapshot, {tier: set(held) for tier, held in self.held.items()}))
        return snapshot


@dataclass
class Seen:
    """The blocks of an instance that the tree should have."""

    epoch: Epoch
    sequence: int = 0
    held: dict[Tier, set[Prompt]] = field(default_factory=nothing)
    expected: dict[Prompt, float] = field(default_factory=dict)

    def depth(self, prompt: Prompt, now_s: float) -> Overlap:
        near, readable = leading(prompt, self.held[Tier.HBM]), leading(prompt, self.held[Tier.DRAM])
        start = max(near, readable)
        soon = {one for one, until in self.expected.items() if until > now_s}
        return Overlap((near, leading(prompt, soon | set(prefixes(prompt)[:start]))), readable)


class ClusterMachine(RuleBasedStateMachine):
    max_blocks: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 100.0
        self.tree = GlobalPromptTree(max_blocks=self.max_blocks, clock=lambda: self.now_s)
        self.pools: dict[InstanceId, Pool] = {}
        self.seen: dict[InstanceId, Seen] = {}
        self.asked: set[Prompt] = set()
        self.epochs = 0

    @initialize()
    def all_join(self) -> None:
        for name in NAMES:
            self.restart(name)

    @rule(name=names, what=st.sampled_from(["restart", "join", "leave", "an_old_epoch_tells_nothing"]))
    def another_life(self, name: InstanceId, what: str) -> None:
        getattr(self, what)(name)

    def restart(self, name: InstanceId) -> None:
        self.epochs += 1
        self.pools[name] = Pool(Epoch(self.epochs))
        self.join(name)

    def join(self, name: InstanceId) -> None:
        epoch = self.pools[name].epoch
        self.tree.join(name, epoch)
        if name not in self.seen or self.seen[name].epoch != epoch:
            self.seen[name] = Seen(epoch)

    def leave(self, name: InstanceId) -> None:
        self.tree.leave(name)
        self.seen.pop(name, None)

    @rule(name=names, tier=tiers, prompt=prompts, arrives=often)
    def store(self, name: InstanceId, tier: Tier, prompt: Prompt, arrives: int) -> None:
        self.asked.add(prompt)
        self.pools[name].store(tier, prompt)
        if arrives:
            self.deliver_all(name)

    @rule(name=names, tier=tiers, arrives=often, data=st.data())
    def remove(self, name: InstanceId, tier: Tier, arrives: int, data: st.DataObject) -> None:
        held = self.pools[name].held[tier]
        if held:
            self.pools[name].remove(tier, data.draw(st.sampled_from(sorted(held))))
        if arrives:
            self.deliver_all(name)

    @rule(name=names)
    def deliver_all(self, name: InstanceId) -> None:
        self.deliver(name, range(len(self.pools[name].log)))

    @rule(name=names, data=st.data())
    def deliver_some(self, name: InstanceId, data: st.DataObject) -> None:
        """Deliver events lost, doubled or in any order."""
        log = self.pools[name].log
        if log:
            self.deliver(name, data.draw(st.lists(st.integers(0, len(log) - 1), max_size=8)))

    def deliver(self, name: InstanceId, places: Iterable[int]) -> None:
        pool, seen = self.pools[name], self.seen.get(name)
        events = [pool.log[i] for i in places]
        expected = seen is not None and seen.epoch == pool.epoch
        if seen is not None and expected:
            for event, change in events:
                if event.sequence > seen.sequence + 1:
                    expected = False
                    break
                if event.sequence == seen.sequence + 1:
                    seen.sequence += 1
                    held = seen.held[event.tier]
                    seen.held[event.tier] = held | change if isinstance(event, Stored) else held - change
                    self.reported(seen, change)
        assert self.tree.apply(name, pool.epoch, [event for event, _ in events]) is expected

    def an_old_epoch_tells_nothing(self, name: InstanceId) -> None:
        event = Stored(1, Tier.HBM, None, tuple(keys_of((0, 1, 0))))
        assert not self.tree.apply(name, Epoch(0), [event])
        self.tree.reset(name, Epoch(0), Snapshot(9, (event,)))

    @rule(name=names, data=st.data())
    def resync(self, name: InstanceId, data: st.DataObject) -> None:
        """Deliver the current snapshot or an old one."""
        pool, seen = self.pools[name], self.seen.get(name)
        pool.snapshot()
        snapshot, held = data.draw(st.sampled_from(pool.snapshots[-3:]))
        self.tree.reset(name, pool.epoch, snapshot)
        if seen is not None and seen.epoch == pool.epoch and snapshot.sequence >= seen.sequence:
            seen.sequence, seen.held = snapshot.sequence, {tier: set(held[tier]) for tier in TIERS}
            self.reported(seen, held[Tier.HBM] | held[Tier.DRAM])

    @rule(name=names, prompt=prompts, for_s=st.integers(-1, 3))
    def expect(self, name: InstanceId, prompt: Prompt, for_s: int) -> None:
        self.asked.add(prompt)
        self.tree.expect(name, keys_of(prompt), self.now_s + for_s)
        seen = self.seen.get(name)
        if seen is not None and for_s > 0:
            start = max(leading(prompt, held) for held in seen.held.values())
            for one in prefixes(prompt)[start:]:
                seen.expected[one] = max(self.now_s + for_s, seen.expected.get(one, 0))

    @rule(passed_s=st.integers(1, 2))
    def wait(self, passed_s: int) -> None:
        self.now_s += passed_s

    @rule(num_blocks=st.integers(0, 20))
    def tidy(self, num_blocks: int) -> None:
        self.tree.tidy(num_blocks)

    def reported(self, seen: Seen, blocks: set[Prompt]) -> None:
        seen.expected = {one: until for one, until in seen.expected.items() if one not in blocks}

    def model(self, prompt: Prompt) -> dict[InstanceId, Overlap]:
        depths = {name: seen.depth(prompt, self.now_s) for name, seen in self.seen.items()}
        return {name: depth for name, depth in depths.items() if depth.cached}

    @invariant()
    def depths_are_the_models(self) -> None:
        for prompt in sorted(self.asked):
            assert self.tree.overlaps(keys_of(prompt)) == self.model(prompt)

    @invariant()
    def counts_are_the_models(self) -> None:
        stats = self.tree.stats()
        assert stats.instances == {
            name: tuple(len(seen.held[tier]) for tier in TIERS) for name, seen in self.seen.items()
        }
        assert stats.holdings == sum(map(sum, stats.instances.values()))

    @precondition(lambda self: self.seen)
    @rule()
    def tidy_frees_blocks_without_holders(self) -> None:
        self.tree.tidy()
        held = [blocks for seen in self.seen.values() for blocks in seen.held.values()]
        stats = self.tree.stats()
        assert stats.blocks == len(set().union(*held))
        holders = {
            frozenset(
                (name, tier) for name in self.seen for tier in TIERS if one in self.seen[name].held[tier]
            )
            for one in set().union(*held)
        }
        assert stats.holder_sets == len(holders | {frozenset()})

    def teardown(self) -> None:
        """After all gaps are repaired, the tree has the blocks of the instances."""
        for name in NAMES:
            if name not in self.pools:
                return
            self.join(name)
            self.tree.reset(name, self.pools[name].epoch, self.pools[name].snapshot())
            self.seen[name] = Seen(self.pools[name].epoch, 0, self.pools[name].held)
        self.now_s += 10
        self.depths_are_the_models()


class BudgetMachine(ClusterMachine):
    """With a budget the tree may have fewer blocks than the model, never others."""

    max_blocks = 12

    def model_has_no_less(self, prompt: Prompt) -> None:
        model = self.model(prompt)
        for name, depth in self.tree.overlaps(keys_of(prompt)).items():
            assert depth.depths[Tier.HBM] <= model[name].depths[Tier.HBM]
            assert depth.cached <= model[name].cached
            assert depth.readable <= model[name].readable

    @invariant()
    def depths_are_the_models(self) -> None:
        for prompt in sorted(self.asked):
            self.model_has_no_less(prompt)

    @invariant()
    def counts_are_the_models(self) -> None:
        stats = self.tree.stats()
        assert stats.blocks <= 12
        for name, held in stats.instances.items():
            assert held[Tier.HBM] <= len(self.seen[name].held[Tier.HBM])
            assert held[Tier.DRAM] <= len(self.seen[name].held[Tier.DRAM])

    @rule()
    def tidy_frees_blocks_without_holders(self) -> None:
        self.tree.tidy()
        stats = self.tree.stats()
        assert stats.blocks <= stats.holdings


steps = st.lists(st.tuples(st.integers(0, 1), prompts, st.integers(0, 2)), max_size=30)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(steps=steps, capacity=st.integers(1, 12))
def test_approximate_caches_equal_lists_of_blocks_in_order_of_use(
    steps: list[tuple[int, Prompt, int]], capacity: int
) -> None:
    """Two approximate instances and one that reports."""
    now_s, ttl_s = 0.0, 5
    tree = GlobalPromptTree(clock=lambda: now_s)
    ann, bob, cyd = NAMES
    tree.join(cyd, Epoch(1))
    assert tree.apply(cyd, Epoch(1), [Stored(1, Tier.DRAM, None, tuple(keys_of((0, 1, 0, 1))))])
    models: dict[InstanceId, list[tuple[Prompt, float]]] = {ann: [], bob: []}
    for name in models:
        tree.join_approximate(name, capacity_blocks=capacity, ttl_s=ttl_s)
    for who, prompt, passed_s in steps:
        now_s += passed_s
        tree.learn(NAMES[who], keys_of(prompt))
        used = prefixes(prompt)
        known = [one for one in models[NAMES[who]] if one[0] not in used and one[1] + ttl_s > now_s]
        models[NAMES[who]] = [*known, *((one, now_s) for one in reversed(used))][-capacity:]
        held = {
            name: {block for block, since_s in model if since_s + ttl_s > now_s}
            for name, model in models.items()
        }
        for asked in [one[1] for one in steps]:
            depths = {name: leading(asked, blocks) for name, blocks in held.items()}
            expected = {name: Overlap((depth, depth), 0) for name, depth in depths.items() if depth}
            if depth := leading(asked, prefixes((0, 1, 0, 1))):
                expected[cyd] = Overlap((0, depth), depth)
            assert tree.overlaps(keys_of(asked)) == expected
        tree.tidy()
        assert tree.stats().blocks == len(held[ann] | held[bob] | set(prefixes((0, 1, 0, 1))))


FEW = settings(max_examples=70, stateful_step_count=40, deadline=None, derandomize=True)
TestCluster = ClusterMachine.TestCase
TestCluster.settings = FEW
TestBudget = BudgetMachine.TestCase
TestBudget.settings = FEW
