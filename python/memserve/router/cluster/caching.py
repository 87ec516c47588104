"""One caching mode for all instances of a cluster: what it is now, and who may not join. Pure."""

from __future__ import annotations

from memserve.core.caching import CachingMode
from memserve.core.ids import InstanceId
from memserve.router.cluster.pools import Pools
from memserve.router.cluster.registry import InstanceRegistry


def caching_of(
    cluster: InstanceRegistry, pools: Pools, *, besides: InstanceId | None = None
) -> CachingMode | None:
    """What those that are registered, `besides` one of them, have agreed on; None if there is nobody.

    Instances named by URL never said what they do, and are not asked.
    """
    said = [(info.instance_id, info.caching) for info in pools.infos()]
    for member in cluster.members():
        if not member.is_static:
            said.append((member.info.instance_id, member.info.caching))
    return next((caching for instance_id, caching in said if instance_id != besides), None)


def rejection_reason(
    cluster: InstanceRegistry, pools: Pools, instance_id: InstanceId, caching: CachingMode
) -> str | None:
    """Why an instance with that value cannot join; None if it can.

    The first one decides; an instance that comes back may change its mind if it is alone.
    """
    agreed = caching_of(cluster, pools, besides=instance_id)
    if agreed is None or agreed is caching:
        return None
    return (
        f"{instance_id} has --caching {caching}, but this cluster runs with --caching {agreed}: "
        f"restart it with --caching {agreed}, or stop all the others first"
    )
