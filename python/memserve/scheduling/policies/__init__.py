"""The registry of routing policies: each module of this folder that defines `POLICY` is one.

    --policy NAME               a policy of this folder
    --policy MODULE:ATTRIBUTE   a `Policy`, or a bare rank function, from any importable module

To add a policy, add one file here. Flag choices, `--help` and the reference follow from it.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from types import MappingProxyType

from memserve.core.errors import ConfigError
from memserve.scheduling.policy import Policy


@cache
def all_policies() -> Mapping[str, Policy]:
    """The policies of this folder by name, in alphabetical order."""
    modules = (import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__))
    found = {module.POLICY.name: module.POLICY for module in modules if hasattr(module, "POLICY")}
    return MappingProxyType(dict(sorted(found.items())))


@cache
def find_policy(name: str) -> Policy:
    """The policy that `--policy name` means. Raises ConfigError that names the error."""
    policy = all_policies().get(name)
    if policy is not None:
        return policy
    module_name, colon, attribute = name.partition(":")
    if not colon:
        known = ", ".join(all_policies())
        raise ConfigError(f"unknown policy {name}: choose from {known}, or give MODULE:FUNCTION")
    try:
        module = import_module(module_name)
    except Exception as error:  # the module is the user's and may raise anything
        raise ConfigError(f"policy {name}: cannot import {module_name!r}: {error}") from error
    found = getattr(module, attribute, None)
    if isinstance(found, Policy):
        return found
    if not callable(found):
        raise ConfigError(f"policy {name}: {module_name} has no function or Policy called {attribute!r}")
    try:
        inspect.signature(found).bind("context", "candidates", "costs")
    except (TypeError, ValueError) as error:
        raise ConfigError(f"policy {name}: it has to take (context, candidates, costs): {error}") from error
    return Policy(name, inspect.getdoc(found) or "", found)


def describe_policies() -> str:
    """All policies with their help, for `--help`."""
    return "; ".join(f"{policy.name}: {policy.help}" for policy in all_policies().values())
