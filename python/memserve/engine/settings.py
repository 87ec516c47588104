"""What `launch_server` decided, on its way to the processes that SGLang spawns: one environment variable."""

from __future__ import annotations

import os

import msgspec

from memserve.core.ids import InstanceId
from memserve.instance.pool_agent import PoolSettings
from memserve.transport.registry import MooncakeProtocol, TransportName

SETTINGS_VARIABLE = "MEMSERVE_ENGINE"


class EngineSettings(msgspec.Struct, frozen=True):
    """What the processes of one server must agree on."""

    transfer: TransportName
    mooncake_protocol: MooncakeProtocol
    cluster_key_file: str | None
    pool: PoolSettings | None = None
    """None: no memory pool under the radix cache."""

    def export(self) -> None:
        """Hand these settings to the processes started from here on."""
        os.environ[SETTINGS_VARIABLE] = msgspec.json.encode(self).decode()

    def of_rank(self, dp_rank: int | None) -> PoolSettings | None:
        """The pool's, by a name of its own where several data-parallel ranks share a server."""
        if self.pool is None or dp_rank is None:
            return self.pool
        name = InstanceId(f"{self.pool.instance_id}/dp{dp_rank}")
        return msgspec.structs.replace(self.pool, instance_id=name)

    @classmethod
    def inherited(cls) -> EngineSettings:
        """What this process was handed. Raises KeyError if that is nothing."""
        return msgspec.json.decode(os.environ[SETTINGS_VARIABLE], type=cls)
