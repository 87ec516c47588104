"""Block keys against SGLang's own page hash, byte for byte."""

from __future__ import annotations

from array import array
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memserve.core.block_keys import (
    BlockKey,
    Namespace,
    continue_keys,
    event_hash,
    key_from_hex,
    keys_from_hex,
    page_keys,
)

tokens = st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 200_000), max_size=70)
names = st.none() | st.text(max_size=8)
namespaces = st.none() | st.builds(Namespace, extra_key=names, cache_salt=names)

SglangKeys = Callable[[list[int], int, Namespace | None], list[str]]


@pytest.fixture(scope="module")
def sglang_keys() -> SglangKeys:
    """Returns SGLang's hashes of the whole pages of token ids."""
    from sglang.srt.mem_cache.radix_cache import RadixKey
    from sglang.srt.mem_cache.utils import get_storage_hash_str

    def keys(token_ids: list[int], page_tokens: int, namespace: Namespace | None) -> list[str]:
        whole = token_ids[: len(token_ids) // page_tokens * page_tokens]
        space = namespace or Namespace()
        key = RadixKey(array("q", whole), extra_key=space.extra_key, cache_salt=space.cache_salt)
        return list(get_storage_hash_str(key, page_size=page_tokens))

    return keys


@settings(deadline=None)
@given(token_ids=tokens, page_tokens=st.integers(1, 20), namespace=namespaces)
def test_keys_equal_sglang_keys(
    sglang_keys: SglangKeys, token_ids: list[int], page_tokens: int, namespace: Namespace | None
) -> None:
    ours = page_keys(token_ids, page_tokens, namespace)
    assert [key.hex() for key in ours] == sglang_keys(token_ids, page_tokens, namespace)
    assert page_keys(array("q", token_ids), page_tokens, namespace) == ours


@settings(deadline=None, max_examples=30)
@given(token_ids=st.lists(st.integers(0, 2**63 - 1) | st.integers(0, 99), max_size=20))
def test_keys_of_ids_beyond_32_bits_equal_sglang_keys(sglang_keys: SglangKeys, token_ids: list[int]) -> None:
    assert [key.hex() for key in page_keys(token_ids, 3)] == sglang_keys(token_ids, 3, None)


@settings(deadline=None)
@given(tokens, tokens, st.integers(1, 9), namespaces)
def test_keys_continue_from_a_parent(
    head: list[int], tail: list[int], page_tokens: int, namespace: Namespace | None
) -> None:
    head = [1] * page_tokens + head[: len(head) // page_tokens * page_tokens]
    first = page_keys(head, page_tokens, namespace)
    assert page_keys(head + tail, page_tokens, namespace) == first + continue_keys(
        first[-1], tail, page_tokens
    )


def test_key_never_changes_between_versions() -> None:
    keys = page_keys([1, 2, 3, 4], 2)
    assert keys[0].hex() == "34fb5c825de7ca4aea6e712f19d439c1da0c92c37b423936c5f618545ca4fa1f"
    assert keys[1].hex() == "c57b445f90651b9a650e516ab2238c965b21af35608a31c303e6d9e407f2915c"


def test_namespaces_separate_equal_tokens() -> None:
    spaces = [
        Namespace(),
        Namespace(""),
        Namespace("a"),
        Namespace(None, "a"),
        Namespace("a", "b"),
        Namespace("ab"),
        Namespace("b", "a"),
    ]
    assert len({page_keys([1, 2], 2, space)[0] for space in spaces}) == len(spaces)
    assert page_keys([1, 2], 2, Namespace(None, "")) == page_keys([1, 2], 2)


def test_event_hashes_equal_sglang_hashes() -> None:
    from sglang.srt.mem_cache.utils import hash_str_to_int64

    for key in page_keys(list(range(64)), 1):
        assert event_hash(key) == hash_str_to_int64(key.hex())


def test_keys_are_read_from_hex() -> None:
    keys = page_keys(list(range(64)), 16)
    assert keys_from_hex(key.hex() for key in keys) == keys
    assert [key_from_hex(key.hex()) for key in keys] == keys
    assert keys_from_hex([]) == []


@pytest.mark.parametrize("texts", [["ab"], ["zz" * 32], ["ab" * 33], ["ab" * 33, "ab" * 31]])
def test_text_that_is_not_a_key_is_rejected(texts: list[str]) -> None:
    with pytest.raises(ValueError, match=r"key|hex"):
        keys_from_hex(texts)
    with pytest.raises(ValueError, match=r"key|hex"):
        key_from_hex(texts[-1])


@pytest.mark.parametrize("token_ids", [[-1, 5], [1, 1 << 63], [1 << 40, -1]])
def test_invalid_token_ids_are_rejected(token_ids: list[int]) -> None:
    with pytest.raises(ValueError, match="token id"):
        page_keys(token_ids, 2)


def test_page_without_tokens_is_rejected() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        page_keys([1], 0)


def test_partial_page_has_no_key() -> None:
    assert page_keys([1, 2, 3], 4) == []
    assert page_keys([], 4) == []
    assert len(page_keys(range(9), 4)) == 2
    assert continue_keys(BlockKey(b"x" * 32), [1], 2) == []
