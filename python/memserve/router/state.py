"""The router's mutable components."""

from __future__ import annotations

import time
from dataclasses import dataclass

from memserve.router.cluster.breaker import Breakers
from memserve.router.cluster.pools import Pools
from memserve.router.cluster.registry import InstanceRegistry
from memserve.router.config import RouterConfig
from memserve.router.kv_events.subscribers import StockSubscriptions
from memserve.router.kv_events.synchronizer import TreeSynchronizer
from memserve.router.observability.metrics import RouterMetrics
from memserve.router.observability.telemetry import Telemetry
from memserve.router.proxy.placement import GlobalScheduler
from memserve.router.tokenization.prompts import PromptReader
from memserve.router.tokenization.tokenizers import Tokenizers
from memserve.scheduling.cost_model.file import COSTS, read_costs
from memserve.scheduling.prompt_tree.tree import BYTES_PER_BLOCK, GlobalPromptTree
from memserve.scheduling.selector import SelectorConfig


@dataclass(frozen=True, slots=True)
class RouterState:
    """The mutable components. Event loop thread only; rebuilt from the instances after a restart."""

    cluster: InstanceRegistry
    pools: Pools
    synchronizer: TreeSynchronizer
    subscriptions: StockSubscriptions
    tokenizers: Tokenizers
    scheduler: GlobalScheduler
    breakers: Breakers
    reader: PromptReader
    telemetry: Telemetry


def new_state(config: RouterConfig, metrics: RouterMetrics) -> RouterState:
    """The components of a new router, empty. Raises ConfigError for a cost file that cannot be read."""
    clock, routing = time.monotonic, config.routing
    cluster = InstanceRegistry(config.cluster, clock)
    pools = Pools(
        config.cluster,
        clock,
        wants_prompt_keys=config.tokenization.routing_keys == "text",
    )
    max_blocks = (config.tree.tree_budget_mib << 20) // BYTES_PER_BLOCK
    tree = GlobalPromptTree(max_blocks=max_blocks, clock=clock)
    synchronizer = TreeSynchronizer(
        tree,
        pools,
        audit_s=config.tree.tree_audit_secs,
        max_snapshot_blocks=config.tree.max_snapshot_blocks,
        audit_bytes_per_s=config.tree.tree_audit_bytes_per_sec,
        clock=clock,
    )
    subscriptions = StockSubscriptions(
        synchronizer.synced_tree,
        max_event_keys=max(config.tree.event_keys, max_blocks // 4),
        approximate_ttl_s=config.tree.learnt_ttl_secs,
    )
    settings = SelectorConfig(
        routing.policies["prefill"],
        routing.policies["decode"],
        start_costs=None if routing.costs == "auto" else read_costs(routing.costs),
        certainty=0.0 if routing.costs in ("auto", *COSTS) else 0.5,
        fetch=routing.fetch,
        max_fetch_s=routing.max_fetch_secs,
        recent_s=routing.recent_work_secs,
    )
    scheduler = GlobalScheduler(settings, synchronizer, pools, subscriptions, metrics, clock)
    breakers = Breakers(config.health, clock)
    tokenizers = Tokenizers(
        config.tokenization.tokenizer_path,
        cache_tokens=config.tokenization.tokenizer_cache_tokens,
        num_threads=config.tokenization.tokenizer_threads,
    )
    reader = PromptReader(tokenizers, config.tokenization.routing_keys)
    telemetry = Telemetry.new(metrics, clock(), config.observability)
    return RouterState(
        cluster, pools, synchronizer, subscriptions, tokenizers, scheduler, breakers, reader, telemetry
    )
