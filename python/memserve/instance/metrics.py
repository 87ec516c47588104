"""The metrics of memory pools in the format of Prometheus. Pure.

A report is what `/mempool` shows of one pool: a section per component (`pool`, `peers`, `outbox`,
`linker`, `hbm`, `events`), each a flat map from a counter's name to its number, or None. What
is no number is left out. `pool` is the DRAM tier; `tiers` has such a section for each further tier of
the pool, by the tier's name. Knows the names and meanings of counters, not where they come from.
Source: Prometheus, "Exposition formats", text format 0.0.4.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Report = Mapping[str, object]
Labels = Mapping[str, str]


class Metric(NamedTuple):
    """Name and meaning of one number of a report."""

    name: str
    """Without `memserve_` and the section."""
    help: str
    kind: Literal["counter", "gauge", "untyped"] = "counter"
    labels: tuple[tuple[str, str], ...] = ()


def _blocks(state: str) -> Metric:
    help = "Blocks by state; the states add up to the capacity."
    return Metric("blocks", help, "gauge", (("state", state),))


_POOL = {
    "total": Metric("capacity_blocks", "Blocks there is memory for.", "gauge"),
    "free": _blocks("free"),
    "private": _blocks("private"),
    "cached": _blocks("cached"),
    "reserved": _blocks("reserved"),
    "quarantined": _blocks("quarantined"),
    "evictable": Metric("evictable_blocks", "Cached blocks without a lease on them or after them.", "gauge"),
    "leases": Metric("leases", "Leases: readers that keep blocks from moving.", "gauge"),
    "reservations": Metric("reservations", "Reservations: blocks promised to other pools.", "gauge"),
    "hits": Metric("hits_total", "Requested blocks that were found."),
    "misses": Metric("misses_total", "Requested blocks that were not found."),
    "evictions": Metric("evictions_total", "Cached blocks that made room for others."),
    "corruptions": Metric("checksum_failures_total", "Blocks whose checksum did not hold: misses."),
    "bytes_sealed": Metric("bytes_in_total", "Bytes that were written to blocks and summed."),
    "bytes_verified": Metric("bytes_out_total", "Bytes of blocks that were checked for a reader."),
}
_PEERS = {
    "pushes": Metric("pushes_total", "Chains sent to other pools: prefill's store, decode's return."),
    "blocks_pushed": Metric("pushed_blocks_total", "Blocks written to other pools."),
    "bytes_pushed": Metric("pushed_bytes_total", "Bytes written to other pools."),
    "blocks_received": Metric("received_blocks_total", "Blocks that other pools wrote here."),
    "fetches": Metric("fetches_total", "Chains read from other pools."),
    "blocks_fetched": Metric("fetched_blocks_total", "Blocks read from other pools."),
    "bytes_fetched": Metric("fetched_bytes_total", "Bytes read from other pools."),
    "declined": Metric("declined_total", "Requests of other pools that were declined here."),
    "corrupt_in_flight": Metric(
        "corrupt_blocks_total", "Blocks that changed on their way.", labels=(("direction", "received"),)
    ),
    "corrupt_on_arrival": Metric(
        "corrupt_blocks_total", "Blocks that changed on their way.", labels=(("direction", "fetched"),)
    ),
    "quarantined": Metric("quarantined_blocks", "Blocks that a peer may still write to.", "gauge"),
    "fenced": Metric("fenced_total", "Data epochs of other pools that were refused for good."),
    "expired_reservations": Metric("expired_reservations_total", "Reservations that were not ended in time."),
    "expired_leases": Metric("expired_leases_total", "Leases of other pools that ran out."),
    "reopened": Metric("reopened_total", "Times that the transports were opened anew after a fence."),
    "failures": Metric("failures_total", "Pushes and fetches that failed, declined ones not counted."),
}
_OUTBOX = {
    "sent": Metric("sent_total", "Chains that were sent to other pools."),
    "blocks": Metric("sent_blocks_total", "Blocks that their receivers lacked and now have."),
    "dropped": Metric("dropped_total", "Chains that were dropped: too many were waiting."),
    "failed": Metric("failed_total", "Chains that could not be sent."),
    "waiting": Metric("waiting", "Chains that wait to be sent.", "gauge"),
}
_LINKER = {
    "offloads_begun": Metric("offloads_begun_total", "Copies from HBM to DRAM that were begun."),
    "offloads": Metric("offloads_total", "Copies from HBM to DRAM that have ended, one way or the other."),
    "offloaded_blocks": Metric("offloaded_blocks_total", "Blocks copied from HBM to DRAM."),
    "offload_s": Metric("offload_seconds_total", "Time spent on copies from HBM to DRAM."),
    "declined_offloads": Metric("declined_offloads_total", "Copies to DRAM that found no free block."),
    "loads": Metric("loads_total", "Copies from DRAM to HBM."),
    "loaded_blocks": Metric("loaded_blocks_total", "Blocks copied from DRAM to HBM."),
    "load_s": Metric("load_seconds_total", "Time spent on copies from DRAM to HBM."),
    "failed_loads": Metric("failed_loads_total", "Copies to HBM that failed; the blocks are recomputed."),
}
_HBM = {
    "blocks": Metric("blocks", "Blocks in HBM, as the router is told.", "gauge"),
    "events": Metric("events_total", "Changes of HBM that the engine told of."),
    "left_out": Metric("left_out_blocks_total", "Blocks in HBM that could not be named for certain."),
}
_EVENTS = {"numbered": Metric("numbered_total", "Changes of the pool's tiers, as told to the router.")}
SECTIONS: Mapping[str, Mapping[str, Metric]] = {
    "pool": _POOL,
    "peers": _PEERS,
    "outbox": _OUTBOX,
    "linker": _LINKER,
    "hbm": _HBM,
    "events": _EVENTS,
}
"""The described numbers by section and field; other numbers are exported without a description."""


class _Sample(NamedTuple):
    metric: Metric
    labels: Labels
    value: int | float


def exposition(reports: Sequence[Report]) -> str:
    """All numbers of some pools for Prometheus.

    Of several reports each carries its place among them as `rank`, unless a section `labels` says
    what to call it.
    """
    families: dict[str, list[_Sample]] = {}
    for rank, report in enumerate(reports):
        labels = report.get("labels")
        if not isinstance(labels, Mapping):
            labels = {"rank": str(rank)} if len(reports) > 1 else {}
        for sample in _samples(report, labels):
            families.setdefault(sample.metric.name, []).append(sample)
    lines: list[str] = []
    for name, samples in families.items():
        metric = samples[0].metric
        lines += [f"# HELP {name} {_escaped(metric.help)}", f"# TYPE {name} {metric.kind}"]
        lines += [f"{name}{_in_braces(sample.labels)} {sample.value}" for sample in samples]
    return "".join(line + "\n" for line in lines)


def _samples(report: Report, labels: Labels) -> Iterator[_Sample]:
    for section, numbers in report.items():
        if section == "labels" or not isinstance(numbers, Mapping):
            continue
        if section == "tiers":
            for tier, of_tier in numbers.items():
                yield from _numbers("pool", of_tier, {**labels, "tier": tier})
        elif section == "pool":
            yield from _numbers(section, numbers, {**labels, "tier": "dram"})
        else:
            yield from _numbers(section, numbers, labels)


def _numbers(section: str, numbers: Mapping[str, object], labels: Labels) -> Iterator[_Sample]:
    for field, value in numbers.items():
        if isinstance(value, int | float):
            known = SECTIONS.get(section, {}).get(field, Metric(field, f"{section}: {field}", "untyped"))
            metric = known._replace(name=f"memserve_{section}_{known.name}")
            yield _Sample(metric, {**labels, **dict(known.labels)}, value)


def _in_braces(labels: Labels) -> str:
    quoted = ",".join(f'{name}="{_escaped(value, quote=True)}"' for name, value in labels.items())
    return f"{{{quoted}}}" if quoted else ""


def _escaped(text: str, *, quote: bool = False) -> str:
    text = text.replace("\\", r"\\").replace("\n", r"\n")
    return text.replace('"', r"\"") if quote else text
