"""Workloads: sessions of requests, made to be like published ones, from a seed.

Knows the requests and their sessions; not the times of sessions (`load`), nor the servers (`systems`).
`make` and `published` take the same settings; `statistics` sets the two side by side.
"""

from __future__ import annotations

from collections.abc import Callable

from load.records import Workload
from memserve.core.errors import ConfigError
from workloads import loogle, nothing_shared, react, sharegpt, trace
from workloads.settings import Settings
from workloads.statistics import Published

__all__ = ["NAMES", "Published", "Settings", "make", "published"]

_MAKERS: dict[str, tuple[Callable[[Settings], Workload], Callable[[Settings], tuple[Published, ...]]]] = {
    "sharegpt": (sharegpt.make, sharegpt.published),
    "loogle": (loogle.make, loogle.published),
    "react": (react.make, react.published),
    "random": (nothing_shared.make, nothing_shared.published),
    "trace": (trace.make, trace.published),
}
NAMES = tuple(_MAKERS)


def make(name: str, settings: Settings) -> Workload:
    """The same name and settings give the same workload. Raises ConfigError for a name not in NAMES."""
    return _of(name)[0](settings)


def published(name: str, settings: Settings) -> tuple[Published, ...]:
    """Figures of the original, in tokens of this scale."""
    return _of(name)[1](settings)


def _of(name: str) -> tuple[Callable[[Settings], Workload], Callable[[Settings], tuple[Published, ...]]]:
    if name not in _MAKERS:
        raise ConfigError(f"there is no workload {name!r}: choose one of {', '.join(NAMES)}")
    return _MAKERS[name]
