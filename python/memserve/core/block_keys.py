"""Keys of KV blocks: SGLang's chained page hash, computed without SGLang and without torch.

    key[0] = sha256(seed   + page 0)        seed: nothing, or the hash of a namespace
    key[i] = sha256(key[i-1] + page i)      page: 4 bytes per token, little endian

A key names a block *and everything before it*: equal keys mean equal prefixes, in every process.
Knows token ids and namespaces; no tokenizers and no storage.
Source: SGLang 0.5.23, mem_cache/utils.py (get_storage_hash_str) and cpp_utils/hash_binding.cpp.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import NewType, cast

BlockKey = NewType("BlockKey", bytes)
"""32 bytes, compared, hashed and sent as they are."""

KEY_BYTES = 32

_WIDE_TAG = b"\xff"  # The odd length distinguishes a page of 8-byte tokens from pages of 4-byte tokens.


@dataclass(frozen=True, slots=True)
class Namespace:
    """Separates equal tokens: by adapter or cache class (`extra_key`) and by tenant (`cache_salt`).

    None and "" are different extra keys; an empty salt is no salt, as in SGLang.
    """

    extra_key: str | None = None
    cache_salt: str | None = None

    def seed(self, version: bytes = b"sglang-cache-namespace-v1") -> bytes:
        """The bytes before the first page: empty for requests without a namespace."""
        salt = self.cache_salt or None
        if self.extra_key is None and salt is None:
            return b""
        digest = sha256(version)
        for part in (self.extra_key, salt):
            if part is None:
                digest.update(b"\x00")
            else:
                encoded = part.encode()
                digest.update(b"\x01" + len(encoded).to_bytes(8, "little") + encoded)
        return digest.digest()


def page_keys(
    token_ids: Sequence[int], page_tokens: int, namespace: Namespace | None = None
) -> list[BlockKey]:
    """The key of each whole page of `token_ids`; the tokens of a last, partial page are ignored.

    Raises ValueError if a token id is negative or does not fit 63 bits, or `page_tokens` < 1.
    """
    return _chain(b"" if namespace is None else namespace.seed(), token_ids, page_tokens)


def continue_keys(parent: BlockKey, token_ids: Sequence[int], page_tokens: int) -> list[BlockKey]:
    """The keys of the whole pages that follow the block `parent`. Raises as `page_keys`.

    page_keys(a + b, n) == page_keys(a, n) + continue_keys(page_keys(a, n)[-1], b, n) for whole pages a.
    """
    return _chain(parent, token_ids, page_tokens)


def key_from_hex(text: str) -> BlockKey:
    """The key of 64 hex digits, as SGLang writes it. Raises ValueError for any other text."""
    key = bytes.fromhex(text)
    if len(key) != KEY_BYTES:
        raise ValueError(f"a block key has {KEY_BYTES} bytes, not {len(key)}")
    return BlockKey(key)


def keys_from_hex(texts: Iterable[str]) -> list[BlockKey]:
    """As `key_from_hex`, for a list such as `PoolTransfer.keys`: one pass in C."""
    texts = list(texts)
    joined = bytes.fromhex("".join(texts))
    if len(joined) != KEY_BYTES * len(texts) or not set(map(len, texts)) <= {2 * KEY_BYTES}:
        raise ValueError(f"{len(texts)} block keys of {KEY_BYTES} bytes each, not these {len(joined)} bytes")
    return [BlockKey(joined[i : i + KEY_BYTES]) for i in range(0, len(joined), KEY_BYTES)]


def event_hash(key: BlockKey) -> int:
    """The hash of this block in SGLang's KV events: the key's first 64 bits, signed, big endian."""
    return int.from_bytes(key[:8], "big", signed=True)


def _chain(previous: bytes, token_ids: Sequence[int], page_tokens: int) -> list[BlockKey]:
    if page_tokens < 1:
        raise ValueError(f"a page has at least one token, not {page_tokens}")
    num_tokens = len(token_ids) // page_tokens * page_tokens
    whole = token_ids if num_tokens == len(token_ids) else token_ids[:num_tokens]
    try:
        words = array("I", whole)
    except OverflowError:
        return _chain_wide(previous, whole, page_tokens)
    if sys.byteorder == "big":
        words.byteswap()
    data = words.tobytes()
    step = page_tokens * words.itemsize
    keys: list[bytes] = []
    for start in range(0, len(data), step):
        previous = sha256(previous + data[start : start + step]).digest()
        keys.append(previous)
    return cast("list[BlockKey]", keys)


def _chain_wide(previous: bytes, token_ids: Sequence[int], page_tokens: int) -> list[BlockKey]:
    """As `_chain`; a page with an id above 32 bits is tagged and has 8 bytes per token."""
    keys = []
    for start in range(0, len(token_ids), page_tokens):
        page = token_ids[start : start + page_tokens]
        if min(page) < 0 or max(page) >= 1 << 63:
            raise ValueError("a token id is a non-negative number of 63 bits")
        wide = max(page) >= 1 << 32
        data = b"".join(token.to_bytes(8 if wide else 4, "little") for token in page)
        previous = sha256(previous + (_WIDE_TAG if wide else b"") + data).digest()
        keys.append(BlockKey(previous))
    return keys
