"""What the whole router shares."""

from __future__ import annotations

from dataclasses import dataclass

from memserve.router.cluster.breaker import Breakers
from memserve.router.cluster.cluster import Cluster
from memserve.router.cluster.pools import Pools
from memserve.router.observe.observed import Observed
from memserve.router.placing.placement import Placer
from memserve.router.text.prompts import PromptReader
from memserve.router.text.tokenizers import Tokenizers
from memserve.router.tree.feed import TreeFeed
from memserve.router.tree.followers import Followers


@dataclass(frozen=True, slots=True)
class RouterState:
    """Everything that has a state. Event loop thread only; nothing that a restart could not rebuild."""

    cluster: Cluster
    pools: Pools
    feed: TreeFeed
    followers: Followers
    tokenizers: Tokenizers
    placer: Placer
    breakers: Breakers
    reader: PromptReader
    observed: Observed
