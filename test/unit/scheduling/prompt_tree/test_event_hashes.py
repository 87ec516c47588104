"""Events with 64-bit hashes: only blocks with certain keys reach the tree."""

from __future__ import annotations

from hashlib import sha256

import pytest

from memserve.core.block_addr import Tier
from memserve.core.block_keys import BlockKey, Namespace, continue_keys, event_hash, page_keys
from memserve.core.ids import Epoch, InstanceId
from memserve.scheduling.prompt_tree.event_hashes import EventHashKeys
from memserve.scheduling.prompt_tree.tree import GlobalPromptTree, Overlap

TOKENS = list(range(12))
KEYS = page_keys(TOKENS, 2)
HASHES = [event_hash(key) for key in KEYS]
SALTED = page_keys(TOKENS, 2, Namespace(cache_salt="tenant"))
SALTED_HASHES = [event_hash(key) for key in SALTED]
ANN, EPOCH = InstanceId("ann"), Epoch(1)


def twin(key: BlockKey) -> BlockKey:
    """Another key with the same event hash."""
    return BlockKey(key[:8] + b"\xff" * 24)


def test_events_of_known_prompts_reach_the_tree() -> None:
    event_keys, tree = EventHashKeys(100), GlobalPromptTree()
    tree.join(ANN, EPOCH)
    event_keys.add(KEYS)
    events = [
        event_keys.stored(1, Tier.HBM, None, HASHES[:4]),
        event_keys.stored(2, Tier.HBM, HASHES[3], HASHES[4:]),
        event_keys.removed(3, Tier.HBM, [HASHES[5], 12345]),
    ]
    assert tree.apply(ANN, EPOCH, events)
    assert tree.overlaps(KEYS) == {ANN: Overlap((5, 5), 0)}


def test_keys_are_computed_from_the_tokens_of_events() -> None:
    event_keys = EventHashKeys(100)
    assert event_keys.stored(1, Tier.HBM, None, HASHES[:3], TOKENS[:6]).keys == tuple(KEYS[:3])
    event = event_keys.stored(2, Tier.HBM, HASHES[2], HASHES[3:], TOKENS[6:])
    assert (event.parent, event.keys) == (KEYS[2], tuple(KEYS[3:]))


@pytest.mark.parametrize(
    ("parent", "hashes", "tokens", "num_keys"),
    [
        (None, SALTED_HASHES, TOKENS, 0),
        (HASHES[0], HASHES[1:], TOKENS[2:], 0),
        (None, [*HASHES[:2], 77, HASHES[3]], TOKENS[:8], 2),
        (None, HASHES, TOKENS[:-1], 0),
        (None, HASHES, [-1] * 12, 0),
        (None, HASHES, [1 << 70] * 12, 0),
        (None, [], TOKENS, 0),
        (None, HASHES, [], 0),
    ],
)
def test_blocks_without_a_certain_key_are_left_out(
    parent: int | None, hashes: list[int], tokens: list[int], num_keys: int
) -> None:
    event = EventHashKeys(100).stored(5, Tier.DRAM, parent, hashes, tokens)
    assert (event.sequence, event.tier, event.keys) == (5, Tier.DRAM, tuple(KEYS[:num_keys]))


def test_salted_keys_are_known_from_requests() -> None:
    event_keys = EventHashKeys(100)
    event_keys.add(SALTED[:4])
    assert event_keys.stored(1, Tier.HBM, None, SALTED_HASHES, TOKENS).keys == tuple(SALTED[:4])
    assert event_keys.stored(2, Tier.HBM, SALTED_HASHES[3], SALTED_HASHES[4:], TOKENS[8:]).keys == tuple(
        SALTED[4:]
    )


def test_two_keys_with_one_hash_are_neither_stored() -> None:
    event_keys = EventHashKeys(100)
    event_keys.add(KEYS)
    event_keys.add([twin(KEYS[2])])
    assert event_keys.num_ambiguous == 1
    assert event_keys.stored(1, Tier.HBM, None, HASHES, TOKENS).keys == tuple(KEYS[:2])
    assert event_keys.stored(2, Tier.HBM, HASHES[2], HASHES[3:]).keys == ()
    assert set(event_keys.removed(3, Tier.HBM, HASHES).keys) == {*KEYS, twin(KEYS[2])}, (
        "one of the two keys was removed"
    )
    event_keys.add(KEYS)
    assert event_keys.key_of(HASHES[2]) is None


def test_least_recently_used_keys_are_forgotten_first() -> None:
    event_keys = EventHashKeys(8)
    event_keys.add(KEYS[:1])
    for start in range(0, 4000, 2):
        event_keys.add(page_keys([start, 5], 2))
        assert event_keys.key_of(HASHES[0]) == KEYS[0]
        assert len(event_keys) <= 8
    event_keys.add(page_keys(list(range(100, 120)), 2))
    assert event_keys.key_of(HASHES[0]) is None
    with pytest.raises(ValueError, match="at least 2"):
        EventHashKeys(1)


def test_salted_keys_are_computed_from_the_salt_of_events() -> None:
    """SGLang computes its hashes from another chain than its keys: one that begins with the salt alone."""
    seed = BlockKey(sha256(b"sglang-cache-salt-v1\0tenant").digest())
    hashes = [event_hash(link) for link in continue_keys(seed, TOKENS, 2)]
    event_keys = EventHashKeys(100)
    assert event_keys.stored(1, Tier.HBM, None, hashes[:4], TOKENS[:8], "tenant").keys == tuple(SALTED[:4])
    event = event_keys.stored(2, Tier.HBM, hashes[3], hashes[4:], TOKENS[8:], "tenant")
    assert (event.parent, event.keys) == (SALTED[3], tuple(SALTED[4:]))
    assert event_keys.removed(3, Tier.HBM, hashes[5:]).keys == tuple(SALTED[5:])
    assert event_keys.stored(4, Tier.HBM, None, hashes, TOKENS, "other").keys == tuple(SALTED), (
        "they are known by now"
    )
    assert EventHashKeys(100).stored(4, Tier.HBM, None, hashes, TOKENS, "other").keys == ()
