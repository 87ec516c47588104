"""Metrics of the router's state, read at each scrape: members, prompt tree, audits, tokenizers, costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from memserve.core.block_addr import LOCAL_TIERS
from memserve.router.http.handlers.state import StateView
from memserve.router.observability.metrics import PREFIX


class StateCollector(Collector):
    """Reads the state. Event loop thread only."""

    def __init__(self, state: StateView) -> None:
        self._state = state

    def collect(self) -> Iterator[Metric]:
        """All families."""
        yield from self._members()
        yield from self._tree()
        yield from self._truth()
        yield from self._tokens()
        yield from self._costs()

    def _members(self) -> Iterator[Metric]:
        states = Counter((member.info.role, member.state) for member in self._state.cluster.members())
        yield _gauge("instances", "Instances known.", ("role", "state"), states)
        breakers = {
            (info.instance_id, self._state.breakers.state(info.instance_id, info.epoch)): 1
            for info in (member.info for member in self._state.cluster.members())
        }
        yield _gauge("breakers", "The state of each instance's breaker.", ("instance", "state"), breakers)
        yield from self._loads()
        followed = self._state.subscriptions.stats().values()
        modes = Counter((how.mode,) for how in followed)
        yield _gauge("followed", "Ready instances, by how the prompt tree follows them.", ("by",), modes)
        sources = {name: one for how in followed for name, one in how.sources.items()}
        for name, help in (
            ("connected", "1 if a worker's own cache events arrive."),
            ("complete", "1 if none of them was missed."),
        ):
            values = {(source,): int(getattr(one, name)) for source, one in sources.items()}
            yield _gauge(f"events_{name}", help, ("instance",), values)
        forgotten = {
            (source, reason): count
            for source, one in sources.items()
            for reason, count in one.forgotten.items()
        }
        help = "Times that the tree dropped all blocks of a worker."
        yield _counter("events_forgotten", help, ("instance", "reason"), forgotten)
        unknown = {(model,): 1 for model in self._state.tokenizers.reasons()}
        yield _gauge("models_without_tokens", "Models whose requests are not tokenized.", ("model",), unknown)
        yield _gauge("pools", "Memory pools known.", (), {(): len(self._state.pools.members())})

    def _loads(self) -> Iterator[Metric]:
        """The loads that instances report with their heartbeats."""
        members = self._state.cluster.members()
        loads = {it.info.instance_id: it.load for it in members if it.load is not None}
        requests = {
            (name, what): count
            for name, load in loads.items()
            for what, count in (("running", load.num_running), ("queued", load.num_queued))
        }
        yield _gauge(
            "instance_requests", "Requests at an instance, as it reports.", ("instance", "what"), requests
        )
        used = {(name,): load.num_used_tokens / max(1, load.max_tokens) for name, load in loads.items()}
        yield _gauge("instance_kv_usage", "Share of its HBM that requests fill.", ("instance",), used)
        ages = {(name,): load.step_age_s for name, load in loads.items()}
        help = "Seconds since an instance's last scheduler step."
        yield _gauge("instance_step_age_seconds", help, ("instance",), ages)
        blocks = Counter[tuple[str, str, str]]()
        for pool in self._state.pools.members():
            for tier in pool.tiers:
                name = pool.info.instance_id
                blocks[name, tier.tier, "cached"] += tier.num_cached
                if tier.num_free is not None:
                    blocks[name, tier.tier, "free"] += tier.num_free
        help = "Blocks of a pool, its ranks together, as it reports."
        yield _gauge("pool_blocks", help, ("instance", "tier", "state"), blocks)

    def _tree(self) -> Iterator[Metric]:
        stats = self._state.synchronizer.synced_tree().stats()
        held = {
            (name, tier.name.lower()): blocks
            for name, one in stats.instances.items()
            for tier, blocks in zip(LOCAL_TIERS, one, strict=True)
        }
        yield _gauge("tree_blocks", "Distinct blocks in the prompt tree.", (), {(): stats.blocks})
        yield _gauge("tree_held_blocks", "Blocks that an instance holds.", ("instance", "tier"), held)
        yield _gauge(
            "tree_expected_blocks", "Blocks dispatched and not reported yet.", (), {(): stats.expected}
        )
        happened = {**asdict(stats.counters), **asdict(self._state.synchronizer.counters())}
        counts = {(what,): count for what, count in happened.items()}
        yield _counter("tree_events", "Events of the prompt tree.", ("what",), counts)

    def _truth(self) -> Iterator[Metric]:
        truths = self._state.synchronizer.audit_results()
        for name, help in (
            ("precision", "Share of the tree's blocks of an instance that its last audit found there."),
            ("recall", "Share of an instance's blocks that the tree had at its last audit."),
            ("phantoms", "Blocks that the tree had and the instance did not."),
        ):
            values = {(instance,): getattr(truth, name) for instance, truth in truths.items()}
            yield _gauge(f"tree_{name}", help, ("instance",), values)

    def _tokens(self) -> Iterator[Metric]:
        stats = self._state.tokenizers.stats()
        for name, help in (
            ("calls", "Requests whose text was tokenized."),
            ("tokens", "Tokens of those requests."),
            ("cached_tokens", "Tokens of those requests that came from the cache."),
            ("seconds", "Time spent tokenizing."),
        ):
            values = {(model,): getattr(one, name) for model, one in stats.items()}
            yield _counter(f"tokenizer_{name}", help, ("model",), values)

    def _costs(self) -> Iterator[Metric]:
        errors, observed = {}, {}
        for model, costs in self._state.scheduler.costs.items():
            for what, one in (("prefill", costs.prefills), ("fetch", costs.fetches)):
                errors[model, what] = one.error
                observed[model, what] = one.num_observed
        labels = ("model", "what")
        yield _gauge(
            "cost_error",
            "Moving mean of |predicted - observed| / observed of timed work.",
            labels,
            errors,
        )
        yield _counter("cost_observations", "Timed prefills and fetches.", labels, observed)


Values = Mapping[Any, float]


def _gauge(name: str, help: str, labels: tuple[str, ...], values: Values) -> Metric:
    family = GaugeMetricFamily(f"{PREFIX}_{name}", help, labels=labels)
    for key, value in values.items():
        family.add_metric([str(part) for part in key], value)
    return family


def _counter(name: str, help: str, labels: tuple[str, ...], values: Values) -> Metric:
    family = CounterMetricFamily(f"{PREFIX}_{name}", help, labels=labels)
    for key, value in values.items():
        family.add_metric([str(part) for part in key], value)
    return family
