"""History that prefill cannot hold comes from its peers: decode's DRAM, or a memory instance.

Prefill's HBM and DRAM hold one conversation each, and several take turns. The router directs fetches that
are faster than computing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from memserve.testing.cluster import wait_for
from memserve.testing.pool_reports import pool_reports, wait_settled
from memserve.wire.messages import Role

from .conftest import ALWAYS_FETCH, REQUEST_TIMEOUT_S, NewCluster, Pair
from .geometry import PAGE, full_pages, page_bytes

NEW_TOKENS = 24
NUM_CONVERSATIONS = 3
TURNS = 6
CONVERSATION_TOKENS = 900
"""Most tokens of a conversation."""
HBM_TOKENS = 1024


def gib_of(tokens: int, model: Path) -> str:
    return str(tokens / PAGE * page_bytes(model) / 2**30)


@pytest.fixture(scope="module")
def scarce(tiny_model: Path, new_cluster: NewCluster) -> Iterator[Pair]:
    """A pair whose prefill has room for one conversation in HBM and one in DRAM; decode has plenty."""
    one = gib_of(HBM_TOKENS, tiny_model)
    small = ("--max-total-tokens", str(HBM_TOKENS), "--dram-gib", one)
    with new_cluster("scarce", router_flags=ALWAYS_FETCH) as cluster:
        pair = Pair(cluster, tiny_model, (), small)
        pair.launch(Role.PREFILL)
        pair.launch(Role.DECODE)
        cluster.wait_ready()
        pair.wait_pair()
        yield pair


def converse(pair: Pair, name: str) -> tuple[int, int, list[list[int]]]:
    """Run conversations in turn: tokens that prefill computed, the least possible number, and the answers."""
    histories = [
        f"{name} {i}: " + "this is how it began, a long time ago. " * 8 for i in range(NUM_CONVERSATIONS)
    ]
    known = [0] * NUM_CONVERSATIONS
    computed = least = 0
    outputs = []
    for _ in range(TURNS):
        for i, history in enumerate(histories):
            answer: Any = pair.generate(text=history, sampling_params={"max_new_tokens": NEW_TOKENS})
            wait_settled(pair.server_urls())
            meta = answer["meta_info"]
            prompt = meta["prompt_tokens"]
            assert prompt + NEW_TOKENS <= CONVERSATION_TOKENS
            computed += prompt - meta["prefill_cached_tokens"]
            least += prompt - min(known[i], (prompt - 1) // PAGE) * PAGE
            known[i] = full_pages(prompt + NEW_TOKENS - 1)
            histories[i] = (
                history + answer["text"] + " What came then, who told you of it, and who of them is left? "
            )
            outputs.append(answer["output_ids"])
    return computed, least, outputs


def report(pair: Pair, name: str) -> dict[str, Any]:
    """The report of one server's pool."""
    urls = {worker["instance_id"]: worker["url"] for worker in pair.workers()}
    (only,) = pool_reports([urls[name]])
    return only


def num_known_blocks(pair: Pair, name: str) -> int:
    """The number of blocks that the router believes one instance to hold, in all its layouts."""
    held = requests.get(f"{pair.url}/tree", timeout=REQUEST_TIMEOUT_S).json()["instances"]
    return sum(sum(tiers.values()) for holder, tiers in held.items() if holder.partition("#")[0] == name)


def shrink(pair: Pair, name: str, dram_gib: float) -> None:
    """Resize the DRAM tier of one server."""
    (url,) = (worker["url"] for worker in pair.workers() if worker["instance_id"] == name)
    before = report(pair, name)["pool"]["total"]
    body = {"server_args": {"memserve_dram_gib": dram_gib}}
    answer = requests.post(f"{url}/set_internal_state", json=body, timeout=REQUEST_TIMEOUT_S)
    assert answer.json() == [True]
    wait_for(lambda: report(pair, name)["pool"]["total"] < before, what="the tier to shrink", timeout_s=30)


def test_history_lost_by_prefill_comes_from_decode(scarce: Pair, pair: Pair) -> None:
    computed, least, outputs = converse(scarce, "a")
    assert computed == least, "what decode holds need not be computed"
    prefill = report(scarce, "prefill")
    assert prefill["peers"]["blocks_fetched"] > 0
    assert prefill["peers"]["failures"] == 0
    assert prefill["pool"]["private"] == prefill["pool"]["reserved"] == prefill["pool"]["leases"] == 0
    assert report(scarce, "decode")["pool"]["leases"] == 0
    assert converse(pair, "a")[2] == outputs, "wherever it comes from, it is the same"


def test_memory_instance_raises_the_hit_rate_and_its_death_costs_recomputation_only(scarce: Pair) -> None:
    """Decode's DRAM shrinks while it serves, too: without a memory instance most history is lost."""
    shrink(scarce, "decode", float(gib_of(HBM_TOKENS, scarce.model)))
    alone, least, _ = converse(scarce, "b")
    assert alone > least

    memory = scarce.cluster.launch_memory("memory", 0.1)
    scarce.cluster.wait_ready()
    wait_for(lambda: "memory" in scarce.pool_names(), what="the memory to be known", timeout_s=15)
    converse(scarce, "first use")  # lends the layout its memory, which the router learns within a second
    wait_for(lambda: num_known_blocks(scarce, "memory") > 0, what="its blocks to be known", timeout_s=15)
    helped, least_helped, outputs = converse(scarce, "c")
    assert helped - least_helped < (alone - least) / 2

    memory.kill()
    after, _, again = converse(scarce, "c")
    assert again == outputs
    assert after > 0
    prefill = report(scarce, "prefill")
    assert prefill["pool"]["private"] == prefill["pool"]["reserved"] == prefill["pool"]["leases"] == 0
