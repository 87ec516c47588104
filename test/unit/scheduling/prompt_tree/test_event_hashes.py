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
NAMES = [event_hash(key) for key in KEYS]
SALTED = page_keys(TOKENS, 2, Namespace(cache_salt="tenant"))
SALTED_NAMES = [event_hash(key) for key in SALTED]
ANN, EPOCH = InstanceId("ann"), Epoch(1)


def twin(key: BlockKey) -> BlockKey:
    """Another key with the same event hash."""
    return BlockKey(key[:8] + b"\xff" * 24)


def test_events_of_known_prompts_reach_the_tree() -> None:
    short, tree = EventHashKeys(100), GlobalPromptTree()
    tree.join(ANN, EPOCH)
    short.add(KEYS)
    events = [
        short.stored(1, Tier.HBM, None, NAMES[:4]),
        short.stored(2, Tier.HBM, NAMES[3], NAMES[4:]),
        short.removed(3, Tier.HBM, [NAMES[5], 12345]),
    ]
    assert tree.apply(ANN, EPOCH, events)
    assert tree.overlaps(KEYS) == {ANN: Overlap((5, 5), 0)}


def test_keys_are_computed_from_the_tokens_of_events() -> None:
    short = EventHashKeys(100)
    assert short.stored(1, Tier.HBM, None, NAMES[:3], TOKENS[:6]).keys == tuple(KEYS[:3])
    event = short.stored(2, Tier.HBM, NAMES[2], NAMES[3:], TOKENS[6:])
    assert (event.parent, event.keys) == (KEYS[2], tuple(KEYS[3:]))


@pytest.mark.parametrize(
    ("parent", "names", "tokens", "num_keys"),
    [
        (None, SALTED_NAMES, TOKENS, 0),
        (NAMES[0], NAMES[1:], TOKENS[2:], 0),
        (None, [*NAMES[:2], 77, NAMES[3]], TOKENS[:8], 2),
        (None, NAMES, TOKENS[:-1], 0),
        (None, NAMES, [-1] * 12, 0),
        (None, NAMES, [1 << 70] * 12, 0),
        (None, [], TOKENS, 0),
        (None, NAMES, [], 0),
    ],
)
def test_blocks_without_a_certain_key_are_left_out(
    parent: int | None, names: list[int], tokens: list[int], num_keys: int
) -> None:
    event = EventHashKeys(100).stored(5, Tier.DRAM, parent, names, tokens)
    assert (event.sequence, event.tier, event.keys) == (5, Tier.DRAM, tuple(KEYS[:num_keys]))


def test_salted_keys_are_known_from_requests() -> None:
    short = EventHashKeys(100)
    short.add(SALTED[:4])
    assert short.stored(1, Tier.HBM, None, SALTED_NAMES, TOKENS).keys == tuple(SALTED[:4])
    assert short.stored(2, Tier.HBM, SALTED_NAMES[3], SALTED_NAMES[4:], TOKENS[8:]).keys == tuple(SALTED[4:])


def test_two_keys_with_one_hash_are_neither_stored() -> None:
    short = EventHashKeys(100)
    short.add(KEYS)
    short.add([twin(KEYS[2])])
    assert short.num_ambiguous == 1
    assert short.stored(1, Tier.HBM, None, NAMES, TOKENS).keys == tuple(KEYS[:2])
    assert short.stored(2, Tier.HBM, NAMES[2], NAMES[3:]).keys == ()
    assert set(short.removed(3, Tier.HBM, NAMES).keys) == {*KEYS, twin(KEYS[2])}, (
        "one of the two keys was removed"
    )
    short.add(KEYS)
    assert short.key_of(NAMES[2]) is None


def test_least_recently_used_keys_are_forgotten_first() -> None:
    short = EventHashKeys(8)
    short.add(KEYS[:1])
    for start in range(0, 4000, 2):
        short.add(page_keys([start, 5], 2))
        assert short.key_of(NAMES[0]) == KEYS[0]
        assert len(short) <= 8
    short.add(page_keys(list(range(100, 120)), 2))
    assert short.key_of(NAMES[0]) is None
    with pytest.raises(ValueError, match="at least 2"):
        EventHashKeys(1)


def test_salted_keys_are_computed_from_the_salt_of_events() -> None:
    """SGLang computes its hashes from another chain than its keys: one that begins with the salt alone."""
    seed = BlockKey(sha256(b"sglang-cache-salt-v1\0tenant").digest())
    names = [event_hash(link) for link in continue_keys(seed, TOKENS, 2)]
    short = EventHashKeys(100)
    assert short.stored(1, Tier.HBM, None, names[:4], TOKENS[:8], "tenant").keys == tuple(SALTED[:4])
    event = short.stored(2, Tier.HBM, names[3], names[4:], TOKENS[8:], "tenant")
    assert (event.parent, event.keys) == (SALTED[3], tuple(SALTED[4:]))
    assert short.removed(3, Tier.HBM, names[5:]).keys == tuple(SALTED[5:])
    assert short.stored(4, Tier.HBM, None, names, TOKENS, "other").keys == tuple(SALTED), (
        "they are known by now"
    )
    assert EventHashKeys(100).stored(4, Tier.HBM, None, names, TOKENS, "other").keys == ()
