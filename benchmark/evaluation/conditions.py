"""The conditions that a report states before its figures: machine, versions, settings, systems."""

from __future__ import annotations

import importlib.metadata
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from figures import commit, machine
from systems.catalogue import SYSTEMS
from workloads import Settings, make, published
from workloads.statistics import compared, statistics_of

FILE = "run.json"
PACKAGES = ("memserve", "sglang", "sglang-router", "torch", "mooncake-transfer-engine-non-cuda", "numpy")
PARTS = {
    "steps": (
        "Caching steps",
        "The paper's steps from two colocated servers to PD-Caching-3, each behind our router, on the same "
        "requests at three rates: shares of what PD-Basic can serve.",
    ),
    "stock": (
        "Against stock SGLang",
        "MemServe as it is by default, and SGLang's own prefill and decode servers behind sglang-router.",
    ),
    "policies": (
        "Routing policies",
        "A LooGLE-like trace on 3 prefill and 1 decode server, the same servers behind each policy; and "
        "prompt_tree over memory pools, with the router fetching KV where that is quicker and without.",
    ),
    "micro": (
        "Micro",
        "The pool's, index's and transfers' calls alone; history in DRAM or elsewhere against computing it; "
        "how well the cost model predicts.",
    ),
    "scale": (
        "Scale",
        "Simulated clusters under the router's own tree, policies and cost model, held against a real small "
        "one; and what one router process carries.",
    ),
    "overheads": ("Overheads", "What each piece costs when nothing is shared."),
}


def conditions(
    workloads: Mapping[str, Settings], saturation: Mapping[str, float], unavailable: Mapping[str, str]
) -> dict[str, Any]:
    """The conditions known before and during the measurement."""
    return {
        "machine": f"{machine()}, {os.cpu_count()} cores",
        "commit": commit(),
        "versions": _versions(),
        "model": "a Llama of 6 layers, hidden 384, random weights, float32 "
        "(scripts/make_tiny_model.py --size bench)",
        "settings": _settings(workloads),
        "workloads": {name: _statistics(name, settings) for name, settings in workloads.items()},
        "systems": {name: {"title": each.title, "what": each.what} for name, each in SYSTEMS.items()},
        "parts": {name: {"title": title, "what": what} for name, (title, what) in PARTS.items()},
        "saturation": dict(saturation),
        "unavailable": dict(unavailable),
    }


def read_conditions(directory: Path) -> dict[str, Any]:
    """The contents of run.json; empty if the file does not exist."""
    path = directory / FILE
    state: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return state


def write_conditions(directory: Path, **changes: Any) -> None:
    """Update run.json. The begin of the first run stays."""
    path = directory / FILE
    state = read_conditions(directory)
    state.setdefault("begun", time.strftime("%Y-%m-%d %H:%M"))
    state |= changes | {"ended": time.strftime("%Y-%m-%d %H:%M")}
    part = path.with_suffix(".part")
    part.write_text(json.dumps(state, indent=1))
    part.replace(path)


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _settings(workloads: Mapping[str, Settings]) -> dict[str, Any]:
    said = {
        name: f"{each.requests} requests a run, {each.scale:g} token(s) of a prompt and "
        f"{each.answer_scale:g} of an answer for a published one"
        for name, each in workloads.items()
    }
    return {"workloads": said, "slo": SLO}


SLO = {
    "sharegpt": {"ttft_s": 0.5, "tpot_s": 0.06},
    "loogle": {"ttft_s": 1.0, "tpot_s": 0.06},
    "react": {"ttft_s": 0.5, "tpot_s": 0.06},
}
"""The latency limits of a good request, on this model."""


def _statistics(name: str, settings: Settings) -> dict[str, Any]:
    """Statistics of the first repeat's workload, beside the published ones."""
    return dict(compared(statistics_of(make(name, settings)), published(name, settings)))
