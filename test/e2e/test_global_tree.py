"""The router's tree equals the servers' pools, block for block in each tier, after evictions and faults.

Both servers have little HBM and little DRAM, so both tiers evict. All messages of the servers to the router
go through a proxy that can lose them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from memserve.testing.cluster import Cluster, Start, wait_for
from memserve.testing.faulty_link import Faults, FaultyLink, FaultyProxy
from memserve.testing.pool_reports import pool_reports, wait_settled
from memserve.wire.link import ControlClient
from memserve.wire.messages import PoolEvents, Role, SnapshotPart

from .conftest import REQUEST_TIMEOUT_S, Pair
from .geometry import PAGE, page_bytes

HBM_TOKENS = 2048
DRAM_BLOCKS = 100
PROMPT_TOKENS = 500
NUM_PROMPTS = 8
AGREED_WITHIN_S = 10.0
ROUTER_FLAGS = ("--heartbeat-secs", "1", "--tree-audit-secs", "1")

Digests = dict[str, dict[str, Any]]
"""By instance and tier: the number of blocks, and the xor of their names."""


@dataclasses.dataclass(frozen=True)
class Stage:
    pair: Pair
    faults: Faults

    def ask(self, topic: str) -> None:
        """Prompts that share a prefix, more than both tiers can hold."""
        for i in range(NUM_PROMPTS):
            text = f"{topic}: " + "as everybody knows. " * 4 + f"Number {i:02}, at length. " * 30
            self.pair.generate(text=text[:PROMPT_TOKENS], sampling_params={"max_new_tokens": 20})

    def rest(self) -> None:
        self.pair.wait_idle()
        wait_settled(self.pair.server_urls())

    def believed(self) -> Digests:
        page = requests.get(f"{self.pair.url}/tree?digest=1", timeout=REQUEST_TIMEOUT_S).json()
        digests: Digests = page["digest"]
        return digests

    def reports(self) -> dict[str, Any]:
        """The report of each server's pool."""
        servers = [(worker["instance_id"], worker["url"]) for worker in self.pair.workers()]
        return {name: pool_reports([url])[0] for name, url in servers}

    def held(self) -> Digests:
        return {name: report["digest"] for name, report in self.reports().items()}

    def wait_agreed(self, *names: str) -> Digests:
        """Wait until the tree equals the pools of exactly these instances; return their contents."""
        self.rest()
        held = self.held()
        assert held.keys() == set(names)
        wait_for(lambda: self.believed() == held, what="the tree to be true", timeout_s=AGREED_WITHIN_S)
        assert self.held() == held, "a server that was not at rest"
        return held

    def counted(self, what: str) -> int:
        """One of the router's counters of tree events."""
        page = requests.get(f"{self.pair.url}/metrics", timeout=REQUEST_TIMEOUT_S).text
        found = re.search(rf'tree_events_total{{what="{what}"}} (\d+)', page)
        return int(found[1]) if found else 0


@pytest.fixture(scope="module")
def stage(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, start: Start) -> Iterator[Stage]:
    faults = Faults()
    dram_gib = str(DRAM_BLOCKS * page_bytes(tiny_model) / 2**30)
    flags = ("--max-total-tokens", str(HBM_TOKENS), "--dram-gib", dram_gib)
    with (
        Cluster(tmp_path_factory.mktemp("tree"), router_flags=ROUTER_FLAGS, start=start) as cluster,
        FaultyProxy(FaultyLink(ControlClient(cluster.control), faults)) as proxy,
    ):
        cluster.control = proxy.address
        pair = Pair(cluster, tiny_model, flags)
        pair.launch(Role.PREFILL)
        pair.launch(Role.DECODE)
        cluster.wait_ready()
        pair.wait_pair()
        yield Stage(pair, faults)
        cluster.close()  # They still have events to report to the router.


def test_tree_equals_the_pools_after_both_tiers_have_evicted(stage: Stage) -> None:
    stage.ask("evictions")
    held = stage.wait_agreed("prefill", "decode")
    reports = stage.reports()
    for name in held:
        assert reports[name]["pool"]["evictions"] > 0
        assert 0 < held[name]["dram"][0] <= DRAM_BLOCKS
        assert 0 < held[name]["hbm"][0] <= HBM_TOKENS // PAGE
        assert reports[name]["hbm"]["left_out"] == 0
    assert held["prefill"] != held["decode"]


def test_tree_equals_the_pools_after_a_flush(stage: Stage) -> None:
    stage.ask("what will be flushed")
    stage.rest()
    stage.pair.flush()
    held = stage.wait_agreed("prefill", "decode")
    assert {blocks for one in held.values() for blocks, _ in one.values()} == {0}


def test_tree_equals_the_pools_after_lost_messages_without_a_snapshot(stage: Stage) -> None:
    """Ten times the usual share, because there are only about a hundred messages."""
    snapshots = stage.counted("resets")
    stage.faults.lose(0.1, PoolEvents, SnapshotPart)
    stage.ask("first what is lost")
    stage.ask("then what pushes it out")
    stage.wait_agreed("prefill", "decode")
    stage.faults.clear()
    assert stage.faults.num_lost > 0
    assert stage.counted("resets") == snapshots


def test_tree_equals_the_pools_after_decode_was_killed_and_restarted(stage: Stage) -> None:
    pair = stage.pair
    pair.cluster.servers["decode"].kill()
    wait_for(lambda: stage.believed().keys() == {"prefill"}, what="the dead to be forgotten", timeout_s=15)
    wait_for(lambda: len(pair.server_urls()) == 1, what="its server to be forgotten, too", timeout_s=15)
    held = stage.wait_agreed("prefill")
    assert held["prefill"]["dram"][0] > 0, "of the living, nothing is forgotten"
    pair.launch(Role.DECODE)
    pair.cluster.wait_ready()
    pair.wait_pair()
    stage.ask("life goes on")
    held = stage.wait_agreed("prefill", "decode")
    assert held["decode"]["dram"][0] > 0


def test_tree_audits_never_found_an_error(stage: Stage) -> None:
    wait_for(lambda: stage.counted("audits") > 5, what="some audits", timeout_s=15)
    assert stage.counted("untrue_audits") == stage.counted("phantoms") == stage.counted("orphans") == 0
