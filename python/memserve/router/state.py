"""What the whole router shares."""

from __future__ import annotations

import time
from dataclasses import dataclass

from memserve.router.cluster.breaker import Breakers
from memserve.router.cluster.pools import Pools
from memserve.router.cluster.registry import InstanceRegistry
from memserve.router.config import RouterConfig
from memserve.router.kv_events.subscribers import MAX_NAMED_KEYS, StockSubscriptions
from memserve.router.kv_events.synchronizer import TreeSynchronizer
from memserve.router.observability.metrics import RouterMetrics
from memserve.router.observability.telemetry import Telemetry
from memserve.router.tokenization.prompts import PromptReader
from memserve.router.tokenization.tokenizers import Tokenizers
from memserve.scheduling.cost_model.file import COSTS, read_costs
from memserve.scheduling.prompt_tree.tree import BYTES_PER_BLOCK, GlobalPromptTree
from memserve.scheduling.selector import InstanceSelector, SelectorConfig


@dataclass(frozen=True, slots=True)
class RouterState:
    """Everything that has a state. Event loop thread only; nothing that a restart could not rebuild."""

    cluster: InstanceRegistry
    pools: Pools
    synchronizer: TreeSynchronizer
    subscriptions: StockSubscriptions
    tokenizers: Tokenizers
    selector: InstanceSelector
    breakers: Breakers
    reader: PromptReader
    telemetry: Telemetry


def new_state(config: RouterConfig, metrics: RouterMetrics) -> RouterState:
    """What a router knows when it starts: nothing. Raises ConfigError for costs that cannot be read."""
    clock = time.monotonic
    policy = config.policy
    prefill_policy, decode_policy = config.prefill_policy or policy, config.decode_policy or policy
    directs_fetches = config.fetch == "auto" and prefill_policy == "prompt_tree"
    cluster = InstanceRegistry(
        config.static, heartbeat_s=config.heartbeat_secs, clock=clock, stuck_s=config.stuck_secs
    )
    pools = Pools(
        heartbeat_s=config.heartbeat_secs,
        clock=clock,
        directs_fetches=directs_fetches,
        wants_prompt_keys=config.routing_keys == "text",
    )
    max_blocks = (config.tree_budget_mib << 20) // BYTES_PER_BLOCK
    tree = GlobalPromptTree(max_blocks=max_blocks, clock=clock)
    synchronizer = TreeSynchronizer(tree, pools, audit_s=config.tree_audit_secs, clock=clock)
    subscriptions = StockSubscriptions(
        lambda: synchronizer.tree,
        lambda one: one.server_info.event_source_info,
        max_named_keys=max(MAX_NAMED_KEYS, max_blocks // 4),
        mirror_ttl_s=config.learnt_ttl_secs,
    )
    settings = SelectorConfig(
        prefill_policy,
        decode_policy,
        start_costs=None if config.costs == "auto" else read_costs(config.costs),
        certainty=0.0 if config.costs in ("auto", *COSTS) else 0.5,
        fetches=directs_fetches,
    )
    selector = InstanceSelector(settings, synchronizer, pools, subscriptions, metrics, clock)
    breakers = Breakers(threshold=config.cb_failure_threshold, timeout_s=config.cb_timeout_secs, clock=clock)
    tokenizers = Tokenizers(config.tokenizer_path)
    reader = PromptReader(tokenizers, config.routing_keys)
    telemetry = Telemetry.new(metrics, clock(), keeps_samples=config.observe.ui_show_prompts)
    return RouterState(
        cluster, pools, synchronizer, subscriptions, tokenizers, selector, breakers, reader, telemetry
    )
