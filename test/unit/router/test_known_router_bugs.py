"""Bugs that users report of other LLM routers, and the tests that keep this router free of them.

 1  With few connections every miss goes to the same replica, and imbalance breaks affinity.
 2  The longest prefix sends everything to one worker if all prompts share a block.
 3  Chats are routed by their first message, or without the chat template.
 4  Trees grow without bound.
 5  Removed or restarted workers leave phantoms; gaps go unnoticed; a new router starts with an empty tree.
 6  One half of a pair fails and the other hangs, or only one is aborted; an open breaker dispatches.
 7  A client's mistakes open breakers.
 8  Cache hits of lower tiers are corrupt without notice; caches are written and never read.
 9  Hits are not shown by tier; no drain; streams do not move; misfits are ignored without notice.
10  Tenants find out by timing which prompts others have cached.

Bugs without a test elsewhere have one here.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest

from memserve.core.block_addr import Tier
from memserve.core.block_keys import page_keys
from memserve.core.cache_events import Stored
from memserve.core.ids import Epoch, InstanceId
from memserve.scheduling.prompt_tree.tree import GlobalPromptTree
from memserve.testing.fake_clock import FakeClock
from memserve.testing.fake_worker import FakeWorker

from .harness import info_of, staged
from .proxy.retry_harness import metric

TEST = Path(__file__).parent.parent.parent
COVERED = {
    1: [
        "unit/scheduling/test_policies.py::test_cold_prompts_spread_at_any_concurrency",
        "unit/router/test_routing.py::test_cold_prompts_spread_at_any_concurrency",
        "unit/scheduling/test_policies.py::test_prompt_tree_chooses_the_lowest_of_the_scores_it_shows",
        "unit/scheduling/test_policies.py::test_new_instance_gets_an_equal_share_of_the_work",
    ],
    2: [
        "unit/scheduling/test_policies.py::test_cold_prompts_spread_at_any_concurrency",
        "e2e/test_routing.py::test_popular_prefix_is_replicated",
    ],
    3: [
        "unit/core/test_block_keys.py::test_keys_equal_sglang_keys",
        "e2e/test_tokenize.py::test_chats_use_the_router_token_ids",
        "e2e/test_routing.py::test_conversation_stays_with_its_history",
    ],
    4: [
        "unit/scheduling/prompt_tree/test_tree.py::test_budget_holds_for_many_unique_prompts",
        "unit/router/test_known_router_bugs.py::test_tree_stays_within_its_budget_under_unique_prompts",
    ],
    5: [
        "unit/scheduling/prompt_tree/test_tree.py::test_events_of_other_epochs_are_ignored",
        "unit/router/kv_events/test_synchronizer.py::test_gap_requests_a_snapshot_that_repairs_the_tree",
        "unit/instance/test_publisher.py::test_publisher_sends_a_snapshot_to_a_restarted_router",
        "unit/instance/test_sync_session.py::test_audit_detects_and_repairs_a_wrong_tree",
        "e2e/test_global_tree.py::test_tree_equals_the_pools_after_decode_was_killed_and_restarted",
        "e2e/test_global_tree.py::test_tree_audits_never_found_an_error",
    ],
    6: [
        "unit/router/proxy/test_pair_atomic.py::test_lost_leg_aborts_the_other_leg",
        "unit/router/proxy/test_pair_atomic.py::test_refusing_leg_aborts_the_other_leg",
        "unit/router/proxy/test_pair_atomic.py::test_leaving_client_frees_both_legs",
        "unit/router/cluster/test_breaker.py::test_half_open_breaker_admits_one_request_at_a_time",
        "unit/router/cluster/test_breaker.py::test_router_retries_elsewhere_and_then_avoids_a_failing_worker",
    ],
    7: ["unit/router/cluster/test_breaker.py::test_breaker_ignores_errors_of_the_client"],
    8: [
        "unit/mempool/test_pool.py::test_pool_counts_and_logs_a_flipped_byte_as_a_miss",
        "unit/engine/test_linker.py::test_linker_does_not_load_a_block_with_a_flipped_bit",
        "unit/mempool/remote/test_peers_faults.py::test_a_byte_flipped_in_the_holders_arena_is_a_miss",
        "e2e/test_dram_tier.py::test_blocks_evicted_from_hbm_are_found_in_dram",
        "e2e/test_remote_memory.py::test_history_lost_by_prefill_comes_from_decode",
    ],
    9: [
        "unit/instance/test_pool_metrics.py::test_blocks_are_shown_by_tier_and_state",
        "unit/router/cluster/test_drain.py::test_evacuation_targets_are_pools_that_can_reuse_the_blocks",
        "unit/router/http/test_workers_api.py::test_a_draining_server_finishes_its_requests_and_gets_no_new_ones",
        "unit/router/proxy/test_recovery.py::test_broken_stream_is_continued_by_another_instance",
        "e2e/test_resume.py::test_streams_continue_after_their_decode_dies",
        "unit/router/test_known_router_bugs.py::test_instance_with_another_page_size_is_not_ready_and_gives_its_reason",
    ],
    10: [
        "unit/router/http/test_tenants.py::test_tenants_share_no_cached_blocks_whatever_salt_they_send",
        "unit/router/http/test_tenants.py::test_chats_and_completions_are_salted_by_tenant",
    ],
}


@pytest.mark.parametrize("complaint", range(1, 11))
def test_every_known_bug_names_existing_tests(complaint: int) -> None:
    assert not missing_tests(COVERED[complaint]), "renamed? Then here, too"


def missing_tests(names: Sequence[str]) -> list[str]:
    """The names, `path::test`, that are no tests of this project."""
    parts = [name.partition("::") for name in names]
    return [test for path, _, test in parts if test not in _tests_in(path)]


@cache
def _tests_in(path: str) -> frozenset[str]:
    tree = ast.parse((TEST / path).read_text())
    return frozenset(
        node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    )


def test_tree_stays_within_its_budget_under_unique_prompts() -> None:
    name, epoch, before = InstanceId("a"), Epoch(1), 0
    tree = GlobalPromptTree(max_blocks=10_000, clock=FakeClock())
    tree.join(name, epoch)
    for number in range(40_000):
        chain = tuple(page_keys([number, number >> 8], 1))
        assert tree.apply(name, epoch, [Stored(number + 1, Tier.HBM, None, chain)])
        if number == 10_000:
            before = _resident_bytes()
    assert tree.stats().blocks <= 10_000
    assert _resident_bytes() - before < 8 << 20, "not even 280 bytes for each prompt that came"


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def test_instance_with_another_page_size_is_not_ready_and_gives_its_reason() -> None:
    async with staged(FakeWorker(page_size=16)) as stage, FakeWorker(page_size=32) as other:
        stage.router.cluster.register(info_of(other, name="other"))
        await stage.until(lambda: "page size" in stage.router.cluster.find("other").reason)
        status, page = await stage.get("/readiness")
        assert (status, page["colocated"]) == (200, 1)
        assert "its page size is 32" in page["not_ready"]["other"]
        assert await metric(stage, 'memserve_router_instances{role="colocated",state="ready"} 1.0')
        assert (await stage.post("/generate", {"text": "hello"}))[0] == 200
        assert not other.requests
