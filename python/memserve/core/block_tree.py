"""The prefix tree of cached blocks: one node per block, addressed by key.

    keys   k0 <- k1 <- k2 <- k3        a prompt
                  ^--- k4 <- k5        a prompt that shares its first two blocks

Keys chain, so a dict of nodes with parent links *is* the radix tree: no node is ever split, equal keys
of two trees are the same node, and merging trees is their union. The tree is prefix-closed: a node's
parent is in it. Knows no tiers, slots or holders: those are the payload. Not thread-safe.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container, Iterator, Sequence
from typing import Generic, TypeVar

import msgspec

from memserve.core.block_keys import BlockKey

P = TypeVar("P")


class Node(msgspec.Struct, Generic[P], eq=False):
    """One block. `key` and `parent` never change, not even after the node has left its tree.

    A Struct, which C code makes: half the time of an insertion goes into making nodes.
    """

    key: BlockKey
    parent: Node[P] | None
    payload: P
    # The children of a node are a linked list threaded through them: 24 bytes a node.
    _first_child: Node[P] | None = None
    _next: Node[P] | None = None
    _previous: Node[P] | None = None

    def __repr__(self) -> str:
        return f"Node({self.key.hex()[:16]}, payload={self.payload!r})"

    @property
    def is_leaf(self) -> bool:
        return self._first_child is None

    def is_leaf_without(self, others: Container[Node[P]]) -> bool:
        """Whether this node would be a leaf without `others`."""
        child = self._first_child
        while child is not None and child in others:
            child = child._next
        return child is None

    def children(self) -> Iterator[Node[P]]:
        """The children, newest first. The tree must not change meanwhile."""
        child = self._first_child
        while child is not None:
            yield child
            child = child._next


class BlockTree(Generic[P]):
    """Prefix-closed nodes by key. `keys` arguments chain: each key's parent is the one before it."""

    __slots__ = ("_nodes",)

    def __init__(self) -> None:
        self._nodes: dict[BlockKey, Node[P]] = {}

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._nodes

    def __iter__(self) -> Iterator[Node[P]]:
        """Every node, parents before their children. The tree must not change meanwhile."""
        return iter(self._nodes.values())

    def nodes(self) -> list[Node[P]]:
        """A copy of all nodes, parents before their children: it stays valid while the tree changes."""
        return list(self._nodes.values())

    def get(self, key: BlockKey) -> Node[P] | None:
        return self._nodes.get(key)

    def depth(self, keys: Sequence[BlockKey]) -> int:
        """How many of `keys`, from the front, are in the tree. Pure; O(log n).

        keys[0] need not be a root: if it is in the tree, so are all its ancestors.
        """
        nodes = self._nodes
        if not keys or keys[0] not in nodes:
            return 0
        if keys[-1] in nodes:
            return len(keys)
        return bisect_left(keys, True, key=lambda key: key not in nodes)

    def match(self, keys: Sequence[BlockKey]) -> list[Node[P]]:
        """The nodes of the longest prefix of `keys` in the tree. Pure."""
        depth = self.depth(keys)
        return list(map(self._nodes.__getitem__, keys if depth == len(keys) else keys[:depth]))

    def chain_to(self, key: BlockKey) -> list[BlockKey]:
        """The keys from the root to `key`; empty if `key` is not in the tree."""
        chain, node = [], self._nodes.get(key)
        while node is not None:
            chain.append(node.key)
            node = node.parent
        return chain[::-1]

    def add(self, key: BlockKey, parent: Node[P] | None, payload: P) -> Node[P]:
        """Add a node below `parent`, or a root. `key` is not in the tree yet; `parent` is."""
        node = Node(key, parent, payload)
        self._nodes[key] = node
        if parent is not None:
            sibling = parent._first_child
            if sibling is not None:
                node._next = sibling
                sibling._previous = node
            parent._first_child = node
        return node

    def insert(
        self, keys: Sequence[BlockKey], payloads: Sequence[P], parent: BlockKey | None = None
    ) -> list[Node[P]]:
        """Add the missing nodes of a chain below `parent` (None: from the root); returns the new nodes.

        payloads[i] belongs to keys[i]; nodes in the tree keep their payload.
        Raises KeyError, changing nothing, if the first missing node's parent is not in the tree.
        """
        depth = self.depth(keys)
        if depth == len(keys):
            return []
        above = keys[depth - 1] if depth else parent
        node = self.add(keys[depth], None if above is None else self._nodes[above], payloads[depth])
        added = [node]
        for key, payload in zip(keys[depth + 1 :], payloads[depth + 1 :], strict=True):
            child = Node(key, node, payload)  # as `add` below one that has no other child
            node._first_child = child
            added.append(child)
            node = child
        self._nodes.update(zip(keys[depth + 1 :], added[1:], strict=True))
        return added

    def remove(self, node: Node[P]) -> None:
        """Remove a leaf. `node` is in this tree and has no children."""
        del self._nodes[node.key]
        after, before, parent = node._next, node._previous, node.parent
        if after is not None:
            after._previous = before
        if before is not None:
            before._next = after
        elif parent is not None:
            parent._first_child = after
        node._next = node._previous = None

    def remove_subtree(self, top: Node[P]) -> list[Node[P]]:
        """Remove `top` and its descendants; returns them, children before their parents."""
        doomed = [top]
        for node in doomed:  # grows as it goes: breadth first
            doomed.extend(node.children())
        doomed.reverse()
        for node in doomed:
            self.remove(node)
        return doomed
