"""From the 64-bit block hashes of SGLang's KV events back to block keys.

    link[0] = sha256(salt seed + page 0)    link[i] = sha256(link[i-1] + page i)      no salt: no seed
    hash[i] = link[i][:8]      format "dynamo", with a namespace: sha256(namespace seed + link[i][:8])[:8]

Without a namespace a link is the block's key. The key of a block is computed from the event's tokens and
certain if the link has the event's hash. Knows no sockets, tiers or trees. Pure.
Source: SGLang 0.5.23, mem_cache/utils.py (compute_node_event_hash_values), disaggregation/kv_events.py
(namespaced_block_hash: the format "dynamo", in which equal tokens of two namespaces differ in hash).
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import NamedTuple

from memserve.core.block_keys import BlockKey, Namespace, continue_keys, event_hash, page_keys


class EventBlock(NamedTuple):
    """A block of a KV event whose key is certain."""

    key: BlockKey
    link: BlockKey
    """What the hashes of this block and of the blocks after it are computed from."""


def blocks_of_event(
    hashes: Sequence[int],
    token_ids: Sequence[int],
    parent: EventBlock | None,
    namespace: Namespace,
    seed: bytes = b"",
) -> list[EventBlock]:
    """The blocks of a BlockStored event, from the front, as far as their keys are certain.

    `token_ids`: of all blocks, in pages of equal size. `parent`: None for the beginning of a prompt;
    otherwise `namespace` is not read. `seed`: `hash_seed` of the namespace in the format "dynamo".
    Never raises for what an engine sent.
    """
    if not hashes or not token_ids or len(token_ids) % len(hashes):
        return []
    page_tokens = len(token_ids) // len(hashes)
    try:
        if parent is not None:
            keys = links = continue_keys(parent.key, token_ids, page_tokens)
            if parent.link != parent.key:
                links = continue_keys(parent.link, token_ids, page_tokens)
        else:
            keys = links = page_keys(token_ids, page_tokens, namespace)
            if namespace.cache_salt:
                links = continue_keys(_salt_seed(namespace.cache_salt), token_ids, page_tokens)
            elif namespace.extra_key is not None:
                links = page_keys(token_ids, page_tokens)
    except (ValueError, TypeError):
        return []
    blocks: list[EventBlock] = []
    for expected, key, link in zip(hashes, keys, links, strict=True):
        if (event_hash(BlockKey(sha256(seed + link[:8]).digest())) if seed else event_hash(link)) != expected:
            break
        blocks.append(EventBlock(key, link))
    return blocks


def hash_seed(namespace: Namespace) -> bytes:
    """The seed of the format "dynamo": empty without a namespace."""
    return namespace.seed(b"sglang-kv-event-namespace-v1")


def _salt_seed(salt: str) -> BlockKey:
    return BlockKey(sha256(b"sglang-cache-salt-v1\0" + salt.encode()).digest())
