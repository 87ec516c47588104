"""BlockTree against a dict of key -> (parent, payload)."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from memserve.core.block_keys import BlockKey, page_keys
from memserve.core.block_tree import BlockTree

prompts = st.lists(st.integers(0, 2), max_size=6)


def keys_of(prompt: list[int]) -> list[BlockKey]:
    return page_keys(prompt, 1)


class TreeMachine(RuleBasedStateMachine):
    """The model: prefixes as tuples of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tree: BlockTree[int] = BlockTree()
        self.model: dict[tuple[int, ...], int] = {}

    @rule(prompt=prompts, payload=st.integers(0, 9))
    def insert(self, prompt: list[int], payload: int) -> None:
        missing = [n for n in range(1, len(prompt) + 1) if tuple(prompt[:n]) not in self.model]
        added = self.tree.insert(keys_of(prompt), [payload] * len(prompt))
        assert [node.key for node in added] == [keys_of(prompt)[n - 1] for n in missing]
        self.model |= {tuple(prompt[:n]): payload for n in missing}

    @rule(prompt=prompts, start=st.integers(0, 6))
    def insert_a_tail(self, prompt: list[int], start: int) -> None:
        keys = keys_of(prompt)
        head, tail = prompt[:start], keys[start:]
        parent = keys[start - 1] if 0 < start <= len(keys) else None
        if not tail:
            return
        if head and tuple(head) not in self.model and tuple(prompt[: start + 1]) not in self.model:
            with pytest.raises(KeyError):
                self.tree.insert(tail, [7] * len(tail), parent)
            return
        self.tree.insert(tail, [7] * len(tail), parent)
        for n in range(start + 1, len(prompt) + 1):
            self.model.setdefault(tuple(prompt[:n]), 7)

    @rule(prompt=prompts, start=st.integers(0, 6))
    def match(self, prompt: list[int], start: int) -> None:
        depth = 0
        while depth < len(prompt) and tuple(prompt[: depth + 1]) in self.model:
            depth += 1
        found = self.tree.match(keys_of(prompt)[start:])
        assert [node.key for node in found] == keys_of(prompt)[start:depth]
        assert [node.payload for node in found] == [
            self.model[tuple(prompt[:n])] for n in range(start + 1, depth + 1)
        ]
        assert self.tree.depth(keys_of(prompt)) == depth

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove_a_leaf(self, data: st.DataObject) -> None:
        prefixes = {prompt[:-1] for prompt in self.model}
        prompt = data.draw(st.sampled_from(sorted(set(self.model) - prefixes)))
        node = self.tree.get(keys_of(list(prompt))[-1])
        assert node is not None
        self.tree.remove(node)
        del self.model[prompt]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove_a_subtree(self, data: st.DataObject) -> None:
        top = data.draw(st.sampled_from(sorted(self.model)))
        node = self.tree.get(keys_of(list(top))[-1])
        assert node is not None
        doomed = [prompt for prompt in self.model if prompt[: len(top)] == top]
        removed = [one.key for one in self.tree.remove_subtree(node)]
        assert sorted(removed) == sorted(keys_of(list(prompt))[-1] for prompt in doomed)
        place = {key: i for i, key in enumerate(removed)}
        for prompt in doomed:
            keys = keys_of(list(prompt))
            assert len(prompt) == len(top) or place[keys[-1]] < place[keys[-2]], "a child goes first"
        for prompt in doomed:
            del self.model[prompt]

    @rule(other=st.lists(prompts, max_size=3))
    def merge(self, other: list[list[int]]) -> None:
        """Merging two trees is inserting their chains, in any order."""
        for prompt in other:
            self.insert(prompt, 3)

    @invariant()
    def the_tree_is_the_model(self) -> None:
        assert {node.key: node.payload for node in self.tree} == {
            keys_of(list(prompt))[-1]: payload for prompt, payload in self.model.items()
        }
        assert len(self.tree) == len(self.model) == len(self.tree.nodes())
        seen = set()
        for node in self.tree:
            assert node.parent is None or node.parent.key in seen, "prefix-closed, parents first"
            assert self.tree.get(node.key) is node
            seen.add(node.key)
            assert node.is_leaf is not any(other.parent is node for other in self.tree)
            assert {child.key for child in node.children()} == {
                other.key for other in self.tree if other.parent is node
            }


TestTree = TreeMachine.TestCase
TestTree.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
