"""The prefix tree of cached prompts: one node per block, addressed by key.

    keys   k0 <- k1 <- k2 <- k3        a prompt
                  ^--- k4 <- k5        another that shares its first two blocks

Keys chain, so a dict of nodes with parent links *is* the radix tree: nothing is ever split, equal
keys of two trees are the same node, and merging trees is their union. The tree is prefix-closed: a
node's parent is in it. Knows no tiers, slots or holders: those are its payload.
Not thread-safe; its owner locks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container, Iterator, Sequence
from typing import Generic, TypeVar

import msgspec

from memserve.core.block_keys import BlockKey

P = TypeVar("P")


class Node(msgspec.Struct, Generic[P], eq=False):
    """One block. `key` and `parent` never change, also after the node has left its tree.

    A Struct, as it is made in C: half the time of inserting is making nodes.
    """

    key: BlockKey
    parent: Node[P] | None
    payload: P
    # The children are a list threaded through them: 24 bytes a node, whatever the shape.
    _first_child: Node[P] | None = None
    _next: Node[P] | None = None
    _previous: Node[P] | None = None

    def __repr__(self) -> str:
        return f"Node({self.key.hex()[:16]}, payload={self.payload!r})"

    @property
    def is_leaf(self) -> bool:
        return self._first_child is None

    def is_leaf_without(self, others: Container[Node[P]]) -> bool:
        """Whether it would be a leaf, were those gone."""
        child = self._first_child
        while child is not None and child in others:
            child = child._next
        return child is None

    def children(self) -> Iterator[Node[P]]:
        """The nodes right below, newest first. The tree must not change meanwhile."""
        child = self._first_child
        while child is not None:
            yield child
            child = child._next


class PromptTree(Generic[P]):
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
        """As iterating, but a copy, made in one step: the caller may read it while the tree changes."""
        return list(self._nodes.values())

    def get(self, key: BlockKey) -> Node[P] | None:
        return self._nodes.get(key)

    def depth(self, keys: Sequence[BlockKey]) -> int:
        """How many of `keys`, from the front, are here. Pure; O(log n).

        The first key need not be a root: being here, it stands for all that comes before it.
        """
        nodes = self._nodes
        if not keys or keys[0] not in nodes:
            return 0
        if keys[-1] in nodes:
            return len(keys)
        return bisect_left(keys, True, key=lambda key: key not in nodes)

    def match(self, keys: Sequence[BlockKey]) -> list[Node[P]]:
        """The nodes of the longest prefix of `keys` that is here. Pure."""
        depth = self.depth(keys)
        return list(map(self._nodes.__getitem__, keys if depth == len(keys) else keys[:depth]))

    def chain_to(self, key: BlockKey) -> list[BlockKey]:
        """The keys from the root to that one; none if it is not here."""
        chain, node = [], self._nodes.get(key)
        while node is not None:
            chain.append(node.key)
            node = node.parent
        return chain[::-1]

    def add(self, key: BlockKey, parent: Node[P] | None, payload: P) -> Node[P]:
        """A new node below `parent`, or a root. `key` is not here yet; `parent` is."""
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
        """Add what is missing of a chain below `parent` (None: from the root); returns the new nodes.

        payloads[i] goes with keys[i]; those of keys that are here already are left alone.
        Raises KeyError, changing nothing, if something is missing and its parent is not here.
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
        """Take out a leaf. `node` is in this tree and has no children."""
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
        """Take out `top` and all below it; returns them, children before their parents."""
        doomed = [top]
        for node in doomed:  # grows as it goes: breadth first
            doomed.extend(node.children())
        doomed.reverse()
        for node in doomed:
            self.remove(node)
        return doomed
