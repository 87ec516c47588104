"""GlobalPromptTree, rule by rule; `test_tree_model.py` tests all rules together."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Sequence
from functools import reduce
from operator import xor

import pytest

from memserve.core.block_addr import Tier
from memserve.core.block_keys import BlockKey, page_keys
from memserve.core.cache_events import CacheEvent, Removed, Snapshot, Stored
from memserve.core.ids import Epoch, InstanceId
from memserve.scheduling.prompt_tree.records import NO_OVERLAP, Overlap
from memserve.scheduling.prompt_tree.tree import BYTES_PER_BLOCK, MAX_CHAIN_BLOCKS, GlobalPromptTree
from memserve.testing.fake_clock import FakeClock

ANN, BOB, CYD = InstanceId("ann"), InstanceId("bob"), InstanceId("cyd")
EPOCH = Epoch(7)
HBM, DRAM, REMOTE = Tier.HBM, Tier.DRAM, Tier.REMOTE


def keys(prompt: str) -> list[BlockKey]:
    """One block per letter."""
    return page_keys([ord(letter) for letter in prompt], 1)


def stored(sequence: int, prompt: str, tier: Tier = HBM, start: int = 0) -> Stored:
    chain = keys(prompt)
    return Stored(sequence, tier, chain[start - 1] if start else None, tuple(chain[start:]))


def removed(sequence: int, prompt: str, num_blocks: int, tier: Tier = HBM) -> Removed:
    return Removed(sequence, tier, tuple(reversed(keys(prompt)[-num_blocks:])))


def tree_of(
    *reports: tuple[InstanceId, Sequence[CacheEvent]], max_blocks: int | None = None
) -> GlobalPromptTree:
    tree = GlobalPromptTree(max_blocks=max_blocks)
    for instance, events in reports:
        tree.join(instance, EPOCH)
        assert tree.apply(instance, EPOCH, events)
    return tree


@pytest.mark.parametrize(
    ("events", "depth"),
    [
        ([stored(1, "abc")], Overlap((3, 3), 0)),
        ([stored(1, "abc", DRAM)], Overlap((0, 3), 3)),
        ([stored(1, "ab"), stored(2, "abcd", DRAM)], Overlap((2, 4), 4)),
        ([stored(1, "abcd"), stored(2, "ab", DRAM)], Overlap((4, 4), 2)),
        ([stored(1, "ab"), stored(2, "abcd", HBM, start=2)], Overlap((4, 4), 0)),
        ([stored(1, "abcd"), removed(2, "abcd", 2)], Overlap((2, 2), 0)),
        ([stored(1, "abcd", DRAM), stored(2, "abcd"), removed(3, "abcd", 3)], Overlap((1, 4), 4)),
        ([stored(1, "abcde"), Removed(2, HBM, tuple(keys("abcde")[2:]))], Overlap((2, 2), 0)),
        ([stored(1, "abcde"), Removed(2, HBM, tuple(keys("abc")[2:]))], Overlap((2, 2), 0)),
        (
            [stored(1, "abc"), stored(2, "abd"), Removed(3, HBM, (keys("abd")[2], keys("ab")[1]))],
            Overlap((1, 1), 0),
        ),
        ([stored(1, "abxy"), stored(2, "abcd"), removed(3, "abxy", 2)], Overlap((4, 4), 0)),
        ([stored(1, "abxy")], Overlap((2, 2), 0)),
        ([stored(1, "abcd", REMOTE)], None),
        ([stored(1, "xbcd")], None),
        ([stored(1, "abcd"), removed(2, "abcd", 4)], None),
    ],
)
def test_overlap_counts_blocks_held_from_the_front_by_tier(
    events: list[CacheEvent], depth: Overlap | None
) -> None:
    others = [stored(1, "abcdefgh", DRAM)]
    tree = tree_of((ANN, events), (BOB, others), (CYD, []))
    assert tree.overlaps(keys("abcde")) == {BOB: Overlap((0, 5), 5)} | ({ANN: depth} if depth else {})
    assert tree.overlaps([]) == {}


def test_overlaps_tell_300_depths_of_300_instances_apart() -> None:
    prompt = "".join(map(chr, range(1000, 1300)))
    names = [InstanceId(f"i{n}") for n in range(300)]
    tree = tree_of(*((name, [stored(1, prompt[: n + 1])]) for n, name in enumerate(names)))
    assert tree.overlaps(keys(prompt)) == {name: Overlap((n + 1, n + 1), 0) for n, name in enumerate(names)}
    assert tree.overlaps(keys(prompt[:150] + "x"))[names[-1]] == Overlap((150, 150), 0)


def test_events_after_a_gap_wait_for_the_missing_events() -> None:
    tree = tree_of((ANN, [stored(1, "ab")]))
    late = stored(2, "abc", HBM, start=2)
    assert not tree.apply(ANN, EPOCH, [stored(3, "xy"), stored(4, "z")])
    assert not tree.apply(ANN, EPOCH, [stored(3, "xy")])
    assert tree.overlaps(keys("xy")) == tree.overlaps(keys("z")) == {}
    assert tree.apply(ANN, EPOCH, [late, stored(3, "xy")])
    assert tree.overlaps(keys("abc")) == {ANN: Overlap((3, 3), 0)}
    assert tree.overlaps(keys("xy")) == {ANN: Overlap((2, 2), 0)}
    assert tree.stats().counters.gaps == 2


def test_repeated_events_are_ignored() -> None:
    tree = tree_of((ANN, [stored(1, "abc"), removed(2, "abc", 1)]))
    assert tree.apply(ANN, EPOCH, [stored(1, "abc"), removed(2, "abc", 1), stored(1, "abc")])
    assert tree.overlaps(keys("abc")) == {ANN: Overlap((2, 2), 0)}
    assert tree.stats().counters.repeated == 3


def test_snapshot_replaces_all_blocks_and_later_events_continue_it() -> None:
    tree = tree_of((ANN, [stored(1, "abc"), stored(2, "xyz")]), (BOB, [stored(1, "xyz")]))
    tree.reset(ANN, EPOCH, Snapshot(9, (stored(0, "abcd", DRAM), stored(0, "ab"))))
    assert tree.overlaps(keys("abcd")) == {ANN: Overlap((2, 4), 4)}
    assert tree.overlaps(keys("xyz")) == {BOB: Overlap((3, 3), 0)}
    assert tree.apply(ANN, EPOCH, [stored(9, "q"), stored(10, "xy")])
    assert tree.overlaps(keys("xyz")) == {ANN: Overlap((2, 2), 0), BOB: Overlap((3, 3), 0)}
    tree.reset(ANN, EPOCH, Snapshot(9, ()))
    assert tree.overlaps(keys("xyz"))[ANN] == Overlap((2, 2), 0), "an older snapshot is ignored"
    assert tree.stats().counters.resets == 1


def test_events_of_other_epochs_are_ignored() -> None:
    tree = tree_of((ANN, [stored(1, "ab")]))
    assert not tree.apply(ANN, Epoch(6), [stored(2, "abc")])
    assert not tree.apply(BOB, EPOCH, [stored(1, "abc")])
    tree.reset(ANN, Epoch(6), Snapshot(9, ()))
    tree.reset(BOB, EPOCH, Snapshot(9, (stored(0, "ab"),)))
    assert tree.overlaps(keys("abc")) == {ANN: Overlap((2, 2), 0)}
    assert tree.stats().counters.unknown == 4
    tree.join(ANN, EPOCH)
    assert tree.overlaps(keys("abc")) == {ANN: Overlap((2, 2), 0)}, "joining again changes nothing"
    tree.join(ANN, Epoch(8))
    assert tree.overlaps(keys("abc")) == {}
    assert tree.apply(ANN, Epoch(8), [stored(1, "a")])


def test_leaving_instance_is_gone_at_once_and_its_memory_is_freed_later() -> None:
    prompts = [f"sys{n:04}" for n in range(2000)]
    events = [stored(n + 1, prompt) for n, prompt in enumerate(prompts)]
    tree = tree_of((ANN, events), (BOB, events[:1]), (CYD, []))
    tree.leave(ANN)
    tree.leave(ANN)
    assert tree.overlaps(keys(prompts[0])) == {BOB: Overlap((7, 7), 0)}
    assert tree.overlaps(keys(prompts[1])) == {BOB: Overlap((6, 6), 0)}
    assert tree.stats().instances == {BOB: (7, 0), CYD: (0, 0)}
    for n in range(100):
        assert tree.apply(CYD, EPOCH, [Removed(n + 1, HBM, ())])
    stats = tree.stats()
    assert (stats.blocks, stats.holdings, stats.holder_sets) == (7, 7, 2)
    tree.join(ANN, Epoch(9))
    assert tree.apply(ANN, Epoch(9), [stored(1, prompts[1])])
    assert tree.overlaps(keys(prompts[1]))[ANN] == Overlap((7, 7), 0)
    assert tree.stats().blocks == 8


def test_dispatched_blocks_count_until_reported_or_expired() -> None:
    clock = FakeClock()
    tree = GlobalPromptTree(clock=clock)
    for instance in (ANN, BOB):
        tree.join(instance, EPOCH)
    assert tree.apply(ANN, EPOCH, [stored(1, "ab", DRAM)])
    tree.expect(ANN, keys("abcd"), clock() + 5)
    tree.expect(BOB, keys("ab"), clock() + 9)
    tree.expect(CYD, keys("ab"), clock() + 9)
    assert tree.overlaps(keys("abcde")) == {ANN: Overlap((0, 4), 2), BOB: Overlap((0, 2), 0)}
    assert tree.apply(ANN, EPOCH, [stored(2, "abc", DRAM, start=2), removed(3, "abc", 1, DRAM)])
    assert tree.overlaps(keys("abcd"))[ANN] == Overlap((0, 2), 2), "reported, and removed since"
    assert tree.overlaps(keys("abxx"))[BOB] == Overlap((0, 2), 0)
    clock.advance(9)
    assert tree.overlaps(keys("abcd")) == {ANN: Overlap((0, 2), 2)}
    tree.tidy()
    assert tree.stats().expected == 0


def test_blocks_expected_twice_count_until_the_later_time() -> None:
    clock = FakeClock()
    tree = GlobalPromptTree(clock=clock)
    tree.join(ANN, EPOCH)
    tree.expect(ANN, keys("abc"), clock() + 5)
    tree.expect(ANN, keys("ab"), clock() + 2)
    tree.expect(ANN, keys("a"), clock() + 9)
    for passed_s, depth in ((2, 3), (3, 1), (3, 1)):
        clock.advance(passed_s)
        tree.tidy()
        assert tree.overlaps(keys("abc")) == {ANN: Overlap((0, depth), 0)}
    tree.leave(ANN)
    tree.join(ANN, EPOCH)
    assert tree.overlaps(keys("abc")) == {}


def test_approximate_cache_keeps_answered_prompts_within_capacity_and_ttl() -> None:
    clock = FakeClock()
    tree = GlobalPromptTree(clock=clock)
    tree.join_approximate(ANN, capacity_blocks=5, ttl_s=60)
    assert tree.overlaps(keys("abc")) == {}
    tree.learn(ANN, keys("abc"))
    tree.learn(BOB, keys("abc"))
    assert tree.overlaps(keys("abc")) == {ANN: Overlap((3, 3), 0)}
    clock.advance(30)
    tree.learn(ANN, keys("axy"))
    assert tree.overlaps(keys("abc")) == {ANN: Overlap((3, 3), 0)}
    tree.learn(ANN, keys("axyz"))
    assert tree.overlaps(keys("abc")) == {ANN: Overlap((2, 2), 0)}, (
        "the least recently used tail is forgotten"
    )
    assert tree.overlaps(keys("axyz")) == {ANN: Overlap((4, 4), 0)}
    clock.advance(30)
    assert tree.overlaps(keys("abc")) == {ANN: Overlap((1, 1), 0)}, "block a is in a prompt used later"
    assert tree.overlaps(keys("axyz")) == {ANN: Overlap((4, 4), 0)}
    tree.learn(ANN, keys("qrstuvw"))
    assert tree.overlaps(keys("qrstuvw")) == {ANN: Overlap((5, 5), 0)}
    assert tree.overlaps(keys("axyz")) == {}
    clock.advance(60)
    assert tree.overlaps(keys("qrstuvw")) == {}
    assert tree.stats().blocks == 0
    assert not tree.apply(ANN, EPOCH, [stored(1, "a")]), "the instance has not joined"
    with pytest.raises(ValueError, match="no approximate cache"):
        tree.join_approximate(ANN, capacity_blocks=0, ttl_s=60)


def test_least_recently_used_tails_are_forgotten_first() -> None:
    tree = tree_of((ANN, [stored(1, "abcd"), stored(2, "abxy"), stored(3, "pqrs")]), max_blocks=10)
    tree.overlaps(keys("abc"))
    assert tree.apply(ANN, EPOCH, [stored(4, "k")])
    assert tree.overlaps(keys("abcd"))[ANN].cached == 3, "d was used before c"
    tree.overlaps(keys("abxy"))
    assert tree.apply(ANN, EPOCH, [stored(5, "lmn")])
    assert tree.stats().blocks == 10
    assert tree.overlaps(keys("pqrs"))[ANN].cached == 1
    assert tree.overlaps(keys("abxy"))[ANN].cached == 4
    assert tree.apply(ANN, EPOCH, [stored(6, "0123456789abcdef")])
    assert tree.overlaps(keys("0123456789abcdef")) == {ANN: Overlap((10, 10), 0)}
    assert tree.stats().counters.forgotten == 1 + 3 + 6 + 10


def test_budget_holds_for_many_unique_prompts() -> None:
    tree = tree_of((ANN, []), (BOB, []), max_blocks=1000)
    tree.join_approximate(CYD, capacity_blocks=None, ttl_s=60)
    shared = keys("system prompt")
    for n in range(10_000):
        chain = tuple(shared + page_keys([*range(13), n + 5000, n], 1)[13:])
        tree.overlaps(shared)
        assert tree.apply((ANN, BOB)[n % 2], EPOCH, [Stored(n // 2 + 1, (HBM, DRAM)[n % 3 > 0], None, chain)])
        if n % 5 == 0:
            tree.learn(CYD, chain)
        assert tree.stats().blocks <= 1000
    assert tree.overlaps(shared)[ANN].cached == len(shared)
    assert tree.stats().blocks > 700
    assert tree.stats().counters.forgotten > 18_000


def test_budget_limits_the_distinct_sets_of_holders() -> None:
    names = [InstanceId(f"i{n}") for n in range(12)]
    tree = tree_of(*((name, []) for name in names), max_blocks=4000)
    sequences = dict.fromkeys(names, 0)
    for n in range(1, 3000):
        for bit, name in enumerate(names):
            if n >> bit & 1:
                sequences[name] += 1
                assert tree.apply(name, EPOCH, [Stored(sequences[name], HBM, None, tuple(page_keys([n], 1)))])
    assert tree.stats().holder_sets <= 1024
    assert tree.overlaps(page_keys([2999], 1)).keys() == {
        name for bit, name in enumerate(names) if 2999 >> bit & 1
    }


def test_block_takes_at_most_the_documented_memory() -> None:
    tree = tree_of((ANN, []), (BOB, []), max_blocks=200_000)
    rng = random.Random(0)
    tracemalloc.start()
    try:
        for n in range(200_000 // 100):
            chain = tuple(BlockKey(rng.randbytes(32)) for _ in range(100))
            tree.apply(ANN, EPOCH, [Stored(n + 1, HBM, None, chain)])
            tree.apply(BOB, EPOCH, [Stored(n + 1, DRAM, None, chain)])
        del chain
        taken = tracemalloc.get_traced_memory()[0] / 200_000
    finally:
        tracemalloc.stop()
    assert tree.stats().blocks == 200_000
    assert 0.75 * BYTES_PER_BLOCK < taken < 1.25 * BYTES_PER_BLOCK


def test_budget_in_bytes_covers_held_learned_and_expected_blocks() -> None:
    """Reported, learned and expected blocks, each with other holders than the block before."""
    tree = tree_of(*((InstanceId(f"i{n}"), []) for n in range(40)), max_blocks=6000)
    for n in range(4):
        tree.join_approximate(InstanceId(f"m{n}"), capacity_blocks=None, ttl_s=60)
    rng = random.Random(0)
    tracemalloc.start()
    try:
        for n in range(800):
            chain = tuple(BlockKey(rng.randbytes(32)) for _ in range(20))
            for name in (f"i{n % 40}", f"i{n % 37}"):
                sequence = tree.compare(InstanceId(name), Snapshot(0, ())).lag * -1 + 1
                assert tree.apply(InstanceId(name), EPOCH, [Stored(sequence, DRAM, None, chain)])
            tree.learn(InstanceId(f"m{n % 4}"), chain[:10])
            tree.expect(ANN, chain, 0.0)
            tree.expect(InstanceId(f"i{n % 7}"), tuple(BlockKey(rng.randbytes(32)) for _ in range(5)), 1e12)
        del chain
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert taken < 1.25 * 6000 * BYTES_PER_BLOCK
    assert tree.stats().blocks > 1000
    assert tree.stats().expected > 1000


ABC = keys("abc")
HOSTILE: list[CacheEvent] = [
    stored(2, "abcdef", HBM, start=5),
    stored(2, "zzz", HBM, start=1),
    Stored(2, HBM, None, (ABC[0], ABC[0])),
    Stored(2, HBM, None, (*keys("xy"), keys("x")[0])),
    Stored(2, HBM, None, (ABC[2], ABC[1], ABC[0])),
    Stored(2, HBM, ABC[2], (ABC[0],)),
    Stored(2, HBM, ABC[0], (ABC[2],)),
    Stored(2, HBM, None, (BlockKey(b"short"),)),
    Stored(2, HBM, None, (BlockKey(b""), BlockKey(b"x" * 1000))),
    Stored(2, HBM, None, (BlockKey(b"x" * 32),) * (MAX_CHAIN_BLOCKS + 1)),
    Stored(2, HBM, None, ()),
    Stored(2, HBM, BlockKey(b"x" * 32), ()),
    Removed(2, HBM, tuple(keys("nobody has this"))),
    Removed(2, HBM, (BlockKey(b""),)),
    Removed(2, DRAM, tuple(ABC)),
    Stored(-5, HBM, None, tuple(keys("xyz"))),
    Stored(1 << 80, HBM, None, tuple(keys("xyz"))),
    stored(2, "abc", REMOTE),
]


@pytest.mark.parametrize("event", HOSTILE)
@pytest.mark.parametrize("max_blocks", [None, 6])
def test_malformed_event_changes_no_other_instance(event: CacheEvent, max_blocks: int | None) -> None:
    tree = tree_of((ANN, [stored(1, "abc")]), (BOB, [stored(1, "abcd")]), max_blocks=max_blocks)
    tree.apply(ANN, EPOCH, [event])
    depths = tree.overlaps(keys("abcd"))
    assert depths[BOB] == Overlap((4, 4), 0)
    assert depths[ANN] == Overlap((3, 3), 0)
    assert tree.overlaps(keys("xyz")) in ({}, {ANN: Overlap((2, 2), 0)})
    assert tree.apply(BOB, EPOCH, [stored(2, "abcde", HBM, start=4)])
    assert tree.overlaps(keys("abcde"))[BOB] == Overlap((5, 5), 0)


def test_rejected_blocks_are_counted() -> None:
    tree = tree_of(
        (ANN, [stored(1, "abc"), stored(2, "axcdef", HBM, start=4), stored(3, "ax", DRAM, start=1)])
    )
    tree.apply(ANN, EPOCH, [Stored(4, HBM, None, (BlockKey(b"short"),) * 3)])
    counters = tree.stats().counters
    assert (counters.orphans, counters.refused) == (2 + 1, 3)


def test_false_events_of_one_instance_never_lengthen_the_overlap_of_another() -> None:
    """One instance reports random chains of existing keys."""
    rng = random.Random(1)
    universe = [one for prompt in ("abcd", "abxy", "pqrs", "aq") for one in keys(prompt)]
    for _ in range(300):
        tree = tree_of((ANN, []), (BOB, []))
        truth: dict[str, int] = {}
        for n in range(1, 12):
            chain = tuple(rng.choices(universe, k=rng.randrange(4)))
            parent = rng.choice([None, *universe])
            lie = rng.choice([Stored(n, HBM, parent, chain), Removed(n, HBM, chain)])
            assert tree.apply(ANN, EPOCH, [lie])
            prompt = rng.choice(["abcd", "abxy", "pqrs"])
            truth[prompt] = 4
            assert tree.apply(BOB, EPOCH, [stored(n, prompt)])
            for asked in ("abcd", "abxy", "pqrs"):
                shared = 2 if asked[0] == "a" and truth.keys() & {"abcd", "abxy"} else 0
                depths = tree.overlaps(keys(asked))
                assert depths.get(BOB, NO_OVERLAP).cached <= truth.get(asked, shared)
                assert all(depth.depths[Tier.HBM] == depth.cached for depth in depths.values())


def test_compare_counts_the_differences_to_a_snapshot() -> None:
    tree = tree_of((ANN, [stored(1, "abcd"), stored(2, "ab", DRAM)]), (BOB, [stored(1, "abcdxyz")]))
    exact = tree.compare(ANN, Snapshot(2, (stored(0, "abcd"), stored(0, "ab", DRAM), stored(0, "x", REMOTE))))
    assert (exact.precision, exact.recall, exact.phantoms, exact.lag) == (1.0, 1.0, 0, 0)
    other = tree.compare(ANN, Snapshot(2, (stored(0, "abxy"), stored(0, "abcd", DRAM))))
    assert (other.held, other.reported, other.both, other.phantoms) == (6, 8, 4, 2)
    assert (other.precision, other.recall) == (4 / 6, 4 / 8)
    later = tree.compare(ANN, Snapshot(5, ()))
    assert (later.lag, later.phantoms) == (3, 6)
    assert tree.compare(CYD, Snapshot(1, (stored(0, "a"),))).recall == 0
    assert tree.compare(BOB, Snapshot(1, (stored(0, "abcdxyz"),))).precision == 1


def test_tree_without_blocks_is_rejected() -> None:
    with pytest.raises(ValueError, match="max_blocks is at least 1"):
        GlobalPromptTree(max_blocks=0)


def test_forgotten_prefix_is_restored_when_a_dispatched_prompt_grows() -> None:
    tree = tree_of((ANN, [stored(1, "abcdef")]), max_blocks=32)
    assert tree.apply(ANN, EPOCH, [stored(2, "0123456789ABCDEFGHIJKLMNOPQR")])
    assert tree.overlaps(keys("abcdef"))[ANN].cached == 4
    tree.expect(ANN, keys("abcdefg"), until_s=float("inf"))
    assert tree.apply(ANN, EPOCH, [stored(3, "abcdefg", HBM, start=6)])
    assert tree.overlaps(keys("abcdefg")) == {ANN: Overlap((7, 7), 0)}
    assert tree.stats().counters.orphans == 0
    assert tree.stats().expected == 0


def test_digest_depends_on_held_blocks_and_tiers_alone() -> None:
    tree = tree_of((ANN, [stored(1, "abcd"), stored(2, "abx", DRAM)]), (BOB, [stored(1, "abcdxyz", DRAM)]))

    def digest(*prompts: str) -> tuple[int, int]:
        names = {int.from_bytes(key[:8], "big") for prompt in prompts for key in keys(prompt)}
        return len(names), reduce(xor, names, 0)

    assert tree.digest(ANN) == {HBM: digest("abcd"), DRAM: digest("abx")}
    assert tree.digest(BOB) == {HBM: (0, 0), DRAM: digest("abcdxyz")}
    assert tree.digest(CYD) == {}
    assert tree.apply(ANN, EPOCH, [removed(3, "abcd", 2), stored(4, "abef", start=2)])
    assert tree.digest(ANN)[HBM] == digest("abef")
    tree.leave(BOB)
    tree.join(BOB, EPOCH)
    assert tree.digest(BOB)[DRAM] == (0, 0)
    tree.reset(ANN, EPOCH, Snapshot(9, (stored(0, "abx", DRAM), stored(0, "abcd", DRAM, start=2))))
    assert tree.digest(ANN) == {HBM: (0, 0), DRAM: digest("abx", "abcd")}
