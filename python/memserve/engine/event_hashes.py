"""Keys of blocks by the 64-bit names that SGLang's KV events give them. Pure: knows no SGLang.

    link[0] = sha256(salt's seed + page 0)     link[i] = sha256(link[i-1] + page i)      no salt: no seed
    name[i] = link[i][:8]                      with a namespace: sha256(its seed + link[i][:8])[:8]

Without a namespace a link is the block's key. A key is computed from an event's tokens and believed if
the tokens' links have the event's names; a block that fails, and all after it, stay unknown.
Source: SGLang 0.5.23, mem_cache/utils.py (compute_node_event_hash_values), disaggregation/kv_events.py
(namespaced_block_hash: the format "dynamo", in which equal tokens of two namespaces differ in name).
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

from memserve.core.block_keys import BlockKey, Namespace, continue_keys, event_hash, page_keys


class EventHashNames:
    """The blocks that an engine holds, as far as they are known. Not thread-safe."""

    def __init__(self) -> None:
        self._keys: dict[int, BlockKey] = {}
        self._links: dict[int, BlockKey] = {}
        """Only of blocks in a namespace."""

    def __len__(self) -> int:
        """Names that are known."""
        return len(self._keys)

    def stored(
        self, names: Sequence[int], parent: int | None, token_ids: Sequence[int], namespace: Namespace
    ) -> tuple[BlockKey | None, list[BlockKey]]:
        """The key of `parent`, and those of `names` that are certain, from the front.

        `token_ids`: of all these blocks; `parent`: None for the beginning of a prompt. Never raises for
        what an engine sent: of blocks that cannot be named there are no keys.
        """
        above = None if parent is None else self._keys.get(parent)
        if parent is not None and above is None:
            return None, []
        seed = _seed(namespace)
        try:
            page_tokens, rest = divmod(len(token_ids), len(names))
            if rest:
                return above, []
            keys = _chain(above, token_ids, page_tokens, namespace)
            links = keys
            if seed:
                link = _salt_seed(namespace) if parent is None else self._links.get(parent)
                links = _chain(link, token_ids, page_tokens, None)
        except (ValueError, TypeError, ZeroDivisionError):
            return above, []
        certain: list[BlockKey] = []
        for name, key, link in zip(names, keys, links, strict=True):
            if _name(link, seed) != name or self._keys.setdefault(name, key) != key:
                break
            if seed:
                self._links[name] = link
            certain.append(key)
        return above, certain

    def removed(self, names: Sequence[int]) -> list[BlockKey]:
        """The keys of those that are known, which they are no longer."""
        keys = [self._keys.pop(name, None) for name in names]
        for name in names if self._links else ():
            self._links.pop(name, None)
        return [key for key in keys if key is not None]

    def clear(self) -> None:
        self._keys.clear()
        self._links.clear()


def _chain(
    above: BlockKey | None, token_ids: Sequence[int], page_tokens: int, namespace: Namespace | None
) -> list[BlockKey]:
    if above is None:
        return page_keys(token_ids, page_tokens, namespace)
    return continue_keys(above, token_ids, page_tokens)


def _name(link: BlockKey, seed: bytes) -> int:
    return event_hash(BlockKey(sha256(seed + link[:8]).digest()) if seed else link)


def _seed(namespace: Namespace) -> bytes:
    """As `Namespace.seed`, for names in place of keys."""
    if namespace.extra_key is None and not namespace.cache_salt:
        return b""
    digest = sha256(b"sglang-kv-event-namespace-v1")
    for part in (namespace.extra_key, namespace.cache_salt or None):
        encoded = b"" if part is None else part.encode()
        digest.update(b"\x00" if part is None else b"\x01" + len(encoded).to_bytes(8, "little") + encoded)
    return digest.digest()


def _salt_seed(namespace: Namespace) -> BlockKey | None:
    """What goes before a salted prompt's first page in its links."""
    salt = namespace.cache_salt
    return BlockKey(sha256(b"sglang-cache-salt-v1\0" + salt.encode()).digest()) if salt else None
