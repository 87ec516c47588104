"""EventBlocks: hashes of SGLang's events back to keys, only where the keys are certain."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.disaggregation.kv_events import kv_event_namespace_seed, namespaced_block_hash
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.utils import compute_node_event_hash_values, hash_str_to_int64

from memserve.core.block_keys import Namespace, page_keys
from memserve.core.event_hashes import EventBlock
from memserve.engine.hbm_events import EventBlocks

PAGE = 4
PLAIN = Namespace()
NAMESPACES = [
    PLAIN,
    Namespace(extra_key="adapter"),
    Namespace(extra_key=""),
    Namespace(cache_salt="tenant"),
    Namespace("adapter", "tenant"),
    Namespace("ä" * 40, "ü"),
]
TOKENS = list(range(100, 100 + 5 * PAGE))


def names_of(tokens: list[int], namespace: Namespace = PLAIN) -> list[int]:
    """The event hashes, by SGLang's own functions."""
    root = SimpleNamespace(key=RadixKey(array("q")), parent=None, hash_value=[], event_hash_value=None)
    key = RadixKey(array("q", tokens), extra_key=namespace.extra_key, cache_salt=namespace.cache_salt)
    node = SimpleNamespace(key=key, parent=root, hash_value=None, event_hash_value=None)
    seed = kv_event_namespace_seed(extra_key=namespace.extra_key, cache_salt=namespace.cache_salt)
    hashes = map(hash_str_to_int64, compute_node_event_hash_values(node, PAGE))
    return [namespaced_block_hash(each, namespace_seed=seed) for each in hashes]


NAMES, KEYS = names_of(TOKENS), page_keys(TOKENS, PAGE)


@pytest.mark.parametrize("namespace", NAMESPACES, ids=str)
def test_chain_is_known_in_each_namespace_for_every_split_into_events(namespace: Namespace) -> None:
    names, keys = names_of(TOKENS, namespace), page_keys(TOKENS, PAGE, namespace)
    for cut in range(1, 6):
        known = EventBlocks()
        assert known.stored(names[:cut], None, TOKENS[: cut * PAGE], namespace) == (None, keys[:cut])
        if cut < 5:
            rest = known.stored(names[cut:], names[cut - 1], TOKENS[cut * PAGE :], namespace)
            assert rest == (keys[cut - 1], keys[cut:])
        assert len(known) == 5


def test_equal_tokens_of_two_namespaces_are_two_blocks() -> None:
    known = EventBlocks()
    for namespace in NAMESPACES:
        known.stored(names_of(TOKENS, namespace), None, TOKENS, namespace)
    assert len(known) == 5 * len(NAMESPACES)
    for namespace in NAMESPACES[::-1]:
        assert known.removed(names_of(TOKENS, namespace)) == page_keys(TOKENS, PAGE, namespace)
    assert len(known) == 0
    assert not known._blocks


@pytest.mark.parametrize("believed", NAMESPACES, ids=str)
@pytest.mark.parametrize("true", NAMESPACES, ids=str)
def test_wrong_namespace_gives_no_keys(true: Namespace, believed: Namespace) -> None:
    _, keys = EventBlocks().stored(names_of(TOKENS, true), None, TOKENS, believed)
    assert keys == (page_keys(TOKENS, PAGE, true) if true == believed else [])


WRONG = [*NAMES[:2], 7, *NAMES[3:]]


@pytest.mark.parametrize(
    ("names", "parent", "tokens", "known"),
    [
        (WRONG, None, TOKENS, 2),  # one name is not its tokens': it and all after it are unknown
        (NAMES, 12345, TOKENS, 0),  # after a block that was never told of
        (NAMES[1:], None, TOKENS[PAGE:], 0),  # no beginning of a prompt
        (NAMES, None, TOKENS[::-1], 0),
        (NAMES, None, TOKENS[:-1], 0),  # no whole pages
        (NAMES, None, [], 0),
        ([], None, TOKENS, 0),
        (NAMES, None, [-1, *TOKENS[1:]], 0),  # no tokens
        (NAMES, None, [(1, 2)] * len(TOKENS), 0),  # pairs, as speculative decoding has them
    ],
)
def test_blocks_without_a_certain_key_are_left_out(
    names: list[int], parent: int | None, tokens: list[Any], known: int
) -> None:
    blocks = EventBlocks()
    assert blocks.stored(names, parent, tokens, PLAIN) == (None, KEYS[:known])
    assert len(blocks) == known
    assert blocks.stored([NAMES[4]], NAMES[3], TOKENS[-PAGE:], PLAIN) == (None, [])


def test_removal_of_unknown_hashes_is_ignored() -> None:
    known = EventBlocks()
    known.stored(NAMES, None, TOKENS, PLAIN)
    assert known.removed([1, NAMES[4], 2, NAMES[3]]) == [KEYS[4], KEYS[3]]
    assert known.removed(NAMES[3:]) == []
    known.clear()
    assert known.removed(NAMES) == []


def test_block_can_be_stored_again() -> None:
    known = EventBlocks()
    known.stored(NAMES, None, TOKENS, PLAIN)
    assert known.stored(NAMES[1:3], NAMES[0], TOKENS[PAGE : 3 * PAGE], PLAIN) == (KEYS[0], KEYS[1:3])
    assert len(known) == 5


def test_hash_shared_by_two_blocks_stays_with_the_first() -> None:
    known = EventBlocks()
    other = page_keys([9] * PAGE, PAGE)[0]
    known._blocks[NAMES[1]] = EventBlock(other, other)
    assert known.stored(NAMES, None, TOKENS, PLAIN) == (None, KEYS[:1])


def test_tokens_beyond_32_bits_have_keys() -> None:
    tokens = [2**32 + 5, *range(7)]
    assert EventBlocks().stored(names_of(tokens), None, tokens, PLAIN) == (None, page_keys(tokens, PAGE))
