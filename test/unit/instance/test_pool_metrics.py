"""The text that Prometheus reads has every number, once described, and survives odd labels."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

import pytest

from memserve.core.ids import Epoch
from memserve.core.kv_layout import KVLayout, Part
from memserve.instance.metrics import SECTIONS, exposition
from memserve.instance.push_queue import PushStats
from memserve.mempool.arena import Arena
from memserve.mempool.pool import MemPool
from memserve.mempool.records import PoolStats
from memserve.mempool.remote.records import PeersStats


def pool_report() -> dict[str, int]:
    layout = KVLayout("m", 1, 1, (Part(1, 16),) * 2, "float32", 4)
    pool = MemPool(layout, Arena(layout.block_bytes, 5), Epoch(1))
    pool.alloc_mem(2)
    return asdict(pool.stats())


def lines(*reports: dict[str, Any]) -> list[str]:
    return exposition(reports).splitlines()


def test_blocks_are_shown_by_tier_and_state() -> None:
    text = lines({"pool": pool_report(), "peers": None})
    start = text.index("# TYPE memserve_pool_blocks gauge")
    assert text[start - 1].startswith("# HELP memserve_pool_blocks Blocks by state")
    assert text[start + 1 : start + 6] == [
        f'memserve_pool_blocks{{tier="dram",state="{state}"}} {count}'
        for state, count in [("free", 3), ("private", 2), ("cached", 0), ("reserved", 0), ("quarantined", 0)]
    ]
    assert 'memserve_pool_capacity_blocks{tier="dram"} 5' in text
    assert 'memserve_pool_hits_total{tier="dram"} 0' in text


def test_further_tiers_are_shown_as_the_dram_tier_is_with_their_own_label() -> None:
    report = pool_report()
    text = lines({"pool": report, "tiers": {"disk": report}})
    start = text.index("# TYPE memserve_pool_capacity_blocks gauge")
    assert text[start + 1 : start + 3] == [
        f'memserve_pool_capacity_blocks{{tier="{tier}"}} 5' for tier in ("dram", "disk")
    ]


def test_each_family_is_declared_once_and_in_one_piece() -> None:
    report = {
        "pool": pool_report(),
        "peers": asdict(PeersStats()),
        "outbox": asdict(PushStats()),
        "linker": {"loads": 3, "load_s": 0.5},
    }
    text = lines(report, report)
    declared = [line.split()[2] for line in text if line.startswith("# TYPE")]
    assert len(declared) == len(set(declared))
    order = [line.split("{")[0] for line in text if not line.startswith("#")]
    assert [name for i, name in enumerate(order) if name not in order[:i]] == declared
    assert sum(i > 0 and order[i - 1] != name for i, name in enumerate(order)) == len(declared) - 1


def test_metrics_of_several_reports_have_a_rank_label() -> None:
    text = lines({"outbox": {"sent": 1}}, {"outbox": {"sent": 2}})
    assert text[2:] == ['memserve_outbox_sent_total{rank="0"} 1', 'memserve_outbox_sent_total{rank="1"} 2']


def test_one_report_needs_no_label() -> None:
    assert lines({"linker": {"load_s": 0.25}})[2:] == ["memserve_linker_load_seconds_total 0.25"]


def test_metrics_keep_the_labels_of_a_report() -> None:
    text = lines({"labels": {"layout": 'a"b\\c\nd'}, "outbox": {"sent": 1}})
    assert text[2] == 'memserve_outbox_sent_total{layout="a\\"b\\\\c\\nd"} 1'


def test_metrics_show_numbers_without_a_description() -> None:
    assert lines({"linker": {"new": 7, "name": "text"}}) == [
        "# HELP memserve_linker_new linker: new",
        "# TYPE memserve_linker_new untyped",
        "memserve_linker_new 7",
    ]


def test_metrics_of_no_reports_are_empty() -> None:
    assert exposition([]) == exposition([{"peers": None}]) == ""


@pytest.mark.parametrize(
    ("section", "record"),
    [("pool", PoolStats), ("peers", PeersStats), ("outbox", PushStats)],
)
def test_every_number_is_described(section: str, record: type[Any]) -> None:
    assert set(SECTIONS[section]) == {field.name for field in fields(record)}


def test_counters_end_in_total_and_others_do_not() -> None:
    for metrics in SECTIONS.values():
        for metric in metrics.values():
            assert metric.name.endswith("_total") == (metric.kind == "counter"), metric
