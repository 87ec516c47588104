"""A tenant: the clients whose requests are counted together and who share cached blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from memserve.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Rates:
    """The limits of one tenant, by the names of the API key file. Raises ConfigError if not positive."""

    rps: float = math.inf
    """Requests per second; as many may arrive at once."""
    tps: float = math.inf
    """Tokens per second: those of prompts, and the most that answers may have."""
    weight: float = 1.0
    """The tenant's share of the slots, relative to the weights of the others that wait."""

    def __post_init__(self) -> None:
        for name in ("rps", "tps", "weight"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} has to be more than 0")
        if math.isinf(self.weight):
            raise ConfigError("weight has to be finite")


@dataclass(frozen=True, slots=True)
class Tenant:
    """See the module."""

    name: str
    rates: Rates = field(default_factory=Rates)


SOLE_TENANT = Tenant("")
"""The tenant of all requests where clients are not told apart."""
