"""The pool's hooks add to SGLang's transfers the facts that SGLang leaves out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer

from memserve.engine.hooks.pool import describe_offload, note_ended_request
from memserve.engine.linker import MemPoolLinker, NodeTransfer


def cache_over(linker: object, before: list[str]) -> Any:
    """A radix cache with this linker under it, and the keys of the pages before each node."""
    wrapper = SimpleNamespace(cache_linker=linker)
    return SimpleNamespace(linker=wrapper, get_prefix_hash_values=lambda node_id: before)


def offload(cache: Any, *, is_finished: bool, host: str | None = "10.0.0.1") -> PoolTransfer:
    """The transfer that the linker gets when SGLang offloads a node in a request's checkpoint."""
    transfers = [PoolTransfer(name=PoolName.KV, keys=["cc"])]
    req = SimpleNamespace(finished=lambda: is_finished, bootstrap_host=host, bootstrap_port=8998)

    def checkpoint(cache: Any, req: Any, *, up_to: int) -> int:
        describe_offload(SimpleNamespace(cache=cache), 7, transfers)
        return up_to

    assert note_ended_request(checkpoint, cache, req, up_to=3) == 3
    (transfer,) = transfers
    return transfer


@pytest.mark.parametrize(("before", "parent"), [(["aa", "bb"], "bb"), ([], None)])
def test_offload_hook_adds_the_page_before_a_node(before: list[str], parent: str | None) -> None:
    transfer = offload(cache_over(MemPoolLinker.__new__(MemPoolLinker), before), is_finished=False)
    assert transfer == NodeTransfer(name=PoolName.KV, keys=["cc"], parent=parent, bootstrap=None)


@pytest.mark.parametrize(
    ("is_finished", "host", "bootstrap"),
    [(True, "10.0.0.1", "10.0.0.1:8998"), (False, "10.0.0.1", None), (True, None, None)],
)
def test_offload_hook_adds_the_prefill_of_an_ended_request_only(
    is_finished: bool, host: str | None, bootstrap: str | None
) -> None:
    cache = cache_over(MemPoolLinker.__new__(MemPoolLinker), [])
    transfer = offload(cache, is_finished=is_finished, host=host)
    assert isinstance(transfer, NodeTransfer)
    assert transfer.bootstrap == bootstrap
    later = [PoolTransfer(name=PoolName.KV, keys=["dd"])]
    describe_offload(SimpleNamespace(cache=cache), 8, later)
    assert isinstance(later[0], NodeTransfer)
    assert later[0].bootstrap is None, "the checkpoint is over"


def test_offload_hook_leaves_the_transfers_of_other_linkers_alone() -> None:
    transfer = offload(cache_over(object(), ["aa"]), is_finished=True)
    assert not isinstance(transfer, NodeTransfer)
