"""Cost models by name, or from the file that `benchmark/fit_cost_model.py` writes."""

from __future__ import annotations

from pathlib import Path

import msgspec

from memserve.core.errors import ConfigError
from memserve.scheduling.cost_model.model import (
    CPU_COSTS,
    GPU_COSTS,
    CostModel,
    DecodeCost,
    PathCost,
    PrefillCost,
)

COSTS = {"gpu": GPU_COSTS, "cpu": CPU_COSTS}


def read_costs(name: str) -> CostModel:
    """One of `COSTS`, or what is in the file of that name. Raises ConfigError if it is neither."""
    if name in COSTS:
        return COSTS[name]
    try:
        return msgspec.json.decode(Path(name).read_bytes(), type=_CostFile).model()
    except OSError as error:
        raise ConfigError(f"--costs {name}: {error.strerror}; else it is {' or '.join(COSTS)}") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"--costs {name}: {error}") from error


class _CostFile(msgspec.Struct, forbid_unknown_fields=True):
    """A `CostModel` without pairs."""

    prefill: PrefillCost
    decode: DecodeCost
    kv_bytes_per_token: int
    dram: PathCost
    remote: PathCost

    def model(self) -> CostModel:
        return CostModel(self.prefill, self.decode, self.kv_bytes_per_token, self.dram, self.remote)
