"""Cost models by name, or from the file that `benchmark/fit_cost_model.py` writes."""

from __future__ import annotations

from pathlib import Path

import msgspec

from memserve.core.block_addr import Tier
from memserve.core.errors import ConfigError
from memserve.scheduling.cost_model.model import (
    CPU_COSTS,
    GPU_COSTS,
    CostModel,
    DecodeCost,
    PathCost,
    PrefillCost,
    load_paths,
)

COSTS = {"gpu": GPU_COSTS, "cpu": CPU_COSTS}


def read_costs(name: str) -> CostModel:
    """The costs of that name in `COSTS`, or else from the file `name`. Raises ConfigError."""
    if name in COSTS:
        return COSTS[name]
    try:
        return msgspec.json.decode(Path(name).read_bytes(), type=_CostFile).model()
    except OSError as error:
        raise ConfigError(
            f"--costs {name}: {error.strerror}; the built-in costs are {' and '.join(COSTS)}"
        ) from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"--costs {name}: {error}") from error


class _CostFile(msgspec.Struct, forbid_unknown_fields=True):
    prefill: PrefillCost
    decode: DecodeCost
    kv_bytes_per_token: int
    dram: PathCost
    remote: PathCost

    def model(self) -> CostModel:
        load = load_paths(self.dram)
        return CostModel(self.prefill, self.decode, self.kv_bytes_per_token, load, self.remote)


def write_costs(costs: CostModel) -> dict[str, object]:
    """The content of a file that `read_costs` reads."""
    file = _CostFile(
        costs.prefill, costs.decode, costs.kv_bytes_per_token, costs.load[Tier.DRAM], costs.remote
    )
    content: dict[str, object] = msgspec.to_builtins(file)
    return content
