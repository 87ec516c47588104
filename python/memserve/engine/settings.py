"""Passes the settings of `launch_server` to the processes that SGLang spawns, in one environment variable."""

from __future__ import annotations

import functools
import os

import msgspec

from memserve.core.ids import InstanceId
from memserve.instance.pool_agent import PoolSettings
from memserve.peering.endpoint import TransferEndpoint
from memserve.transport.registry import TransportConfig

SETTINGS_VARIABLE = "MEMSERVE_ENGINE"


class EngineSettings(msgspec.Struct, frozen=True):
    """The settings that all processes of one server share."""

    handoff: TransportConfig
    pool: PoolSettings | None = None
    """None: there is no memory pool under the radix cache."""

    def export(self) -> None:
        """Pass these settings to the processes that are started from now on."""
        os.environ[SETTINGS_VARIABLE] = msgspec.json.encode(self).decode()

    def of_rank(self, dp_rank: int | None) -> PoolSettings | None:
        """The pool settings of a data-parallel rank, with an instance id of its own; None without a pool."""
        if self.pool is None or dp_rank is None:
            return self.pool
        name = InstanceId(f"{self.pool.instance_id}/dp{dp_rank}")
        return msgspec.structs.replace(self.pool, instance_id=name)

    @classmethod
    def inherited(cls) -> EngineSettings:
        """The settings that this process inherited. Raises KeyError if there are none."""
        return msgspec.json.decode(os.environ[SETTINGS_VARIABLE], type=cls)


@functools.cache
def process_endpoint() -> TransferEndpoint:
    """The one endpoint of this process, for the handoff and the memory pool: the first caller opens it.

    Raises ConfigError if it cannot listen, KeyError if this process inherited no settings.
    """
    return TransferEndpoint(EngineSettings.inherited().handoff)
