"""The flags of `sglang-router`: a launch line written for it starts this router.

    same name, same meaning     the router's own flags; not in these tables
    same meaning, other name    ALIASES, SWITCHES
    no effect here              ELSEWHERE: accepted, and logged what replaces the flag

Source: sglang-router 0.3.2, router_args.py.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from memserve.core.errors import ConfigError

POLICY_SYNONYMS = {"cache_aware": "prompt_tree", "manual": "session", "bucket": "least_load"}
"""Policies with another name here; `bucket` spreads prompts by length, `least_load` by work."""

ALIASES = {
    "--max-payload-size": "--max-body-bytes",
    "--cb-timeout-duration-secs": "--cb-timeout-secs",
    "--tls-cert-path": "--ssl-certfile",
    "--tls-key-path": "--ssl-keyfile",
    "--client-cert-path": "--ssl-client-certfile",
    "--client-key-path": "--ssl-client-keyfile",
}
SWITCHES: dict[str, tuple[str, object]] = {
    "--disable-retries": ("retry_max_retries", 0),
    "--disable-circuit-breaker": ("cb_failure_threshold", sys.maxsize),
    "--pd-disaggregation": ("pd_disaggregation", True),
}
"""Flags without a value, and the setting they change. Pairs are recognized from the servers' roles."""

_TREE = "the prompt tree weighs queues and caches in one prediction, without thresholds; see --policy"
_FORGETS = "the prompt tree drops evicted and least recently used blocks; see --tree-budget-mib"
_JOINS = "the router starts at once, and uses each server as soon as it answers"
_HEALTH = "a server that fails a connection is out at once, and back after a successful probe"
_ENGINE = "the servers do this: give them the flag"
_CACHED = "tokenized texts are always cached"
_STATELESS = "this router stores no conversations: no /v1/responses, no /v1/conversations"
_ADMIN = "management needs a key of --admin-api-key-file"

ELSEWHERE: dict[str, tuple[str | None, str]] = {
    "--cache-threshold": (None, _TREE),
    "--balance-abs-threshold": (None, _TREE),
    "--balance-rel-threshold": (None, _TREE),
    "--bucket-adjust-interval-secs": (None, _TREE),
    "--eviction-interval-secs": (None, _FORGETS),
    "--max-tree-size": (None, _FORGETS),
    "--max-idle-secs": (None, "sessions are hashed to instances, without state"),
    "--assignment-mode": (None, "sessions are hashed to instances, without state"),
    "--dp-aware": (
        "0",
        "a server distributes requests over its data-parallel ranks; the tree has their caches apart",
    ),
    "--enable-igw": ("0", "several models are always served, by the field `model`"),
    "--mini-lb": ("0", "there is one router, for one machine or many"),
    "--worker-startup-timeout-secs": (None, _JOINS),
    "--worker-startup-check-interval": (None, _JOINS),
    "--retry-backoff-multiplier": (None, "the backoff always doubles"),
    "--retry-jitter-factor": (None, "the wait is always drawn between half of the backoff and all of it"),
    "--cb-success-threshold": (None, "one answered request closes a breaker"),
    "--cb-window-duration-secs": (None, "a breaker counts consecutive failures"),
    "--health-failure-threshold": (None, _HEALTH),
    "--health-success-threshold": (None, _HEALTH),
    "--health-check-endpoint": (None, "the router always asks /health"),
    "--disable-health-check": ("0", "servers are checked before use; see --health-check-interval-secs"),
    "--chat-template": (
        None,
        "the servers' own template is used, once they confirm that the router renders it as they do",
    ),
    "--tokenizer-cache-enable-l0": ("0", _CACHED),
    "--tokenizer-cache-l0-max-entries": (None, _CACHED),
    "--tokenizer-cache-enable-l1": ("0", _CACHED),
    "--tokenizer-cache-l1-max-memory": (None, _CACHED),
    "--reasoning-parser": (None, _ENGINE),
    "--tool-call-parser": (None, _ENGINE),
    "--mcp-config-path": (None, _STATELESS),
    "--history-backend": (None, _STATELESS),
    "--oracle-wallet-path": (None, _STATELESS),
    "--oracle-tns-alias": (None, _STATELESS),
    "--oracle-connect-descriptor": (None, _STATELESS),
    "--oracle-username": (None, _STATELESS),
    "--oracle-password": (None, _STATELESS),
    "--oracle-pool-min": (None, _STATELESS),
    "--oracle-pool-max": (None, _STATELESS),
    "--oracle-pool-timeout-secs": (None, _STATELESS),
    "--postgres-db-url": (None, _STATELESS),
    "--postgres-pool-max": (None, _STATELESS),
    "--redis-url": (None, _STATELESS),
    "--redis-pool-max": (None, _STATELESS),
    "--redis-retention-days": (None, _STATELESS),
    "--control-plane-api-keys": ("*", _ADMIN),
    "--control-plane-audit-enabled": ("0", "cluster changes are always logged"),
    "--jwt-issuer": (None, _ADMIN),
    "--jwt-audience": (None, _ADMIN),
    "--jwt-jwks-uri": (None, _ADMIN),
    "--jwt-role-mapping": ("*", _ADMIN),
}
"""By flag: its number of values (argparse's nargs; "0": a switch), and what replaces it here."""

_PREFIX = "_sglang_router_"


class CompatParser(argparse.ArgumentParser):
    """Accepts both routers' flags, and suggests a flag for an unknown one."""

    def add_compatible(self) -> None:
        """Add sglang-router's flags; to be called after the router's own are added."""
        by_name = {name: action for action in self._actions for name in action.option_strings}
        hidden: dict[str, Any] = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        for flag, meant in ALIASES.items():
            action = by_name[meant]
            self.add_argument(flag, dest=action.dest, type=action.type or str, **hidden)
        for flag, (dest, value) in SWITCHES.items():
            self.add_argument(flag, dest=dest, action="store_const", const=value, **hidden)
        self.add_argument("--model-path", dest=_PREFIX + "--model-path", **hidden)
        self.add_argument("--ca-cert-paths", dest=_PREFIX + "--ca-cert-paths", nargs="*", **hidden)
        self.add_argument("--backend", dest=_PREFIX + "--backend", **hidden)
        for flag, (nargs, _) in ELSEWHERE.items():
            how: dict[str, Any] = {"action": "store_true"} if nargs == "0" else {"nargs": nargs}
            self.add_argument(flag, dest=_PREFIX + flag, **how, **hidden)

    def error(self, message: str) -> NoReturn:
        """Exit the process; suggest a flag for an unknown one."""
        kind, _, rest = message.partition("unrecognized arguments: ")
        flag = rest.split(" ")[0].partition("=")[0]
        known = [name for action in self._actions for name in action.option_strings]
        if not kind and (close := difflib.get_close_matches(flag, known, 1)):
            message = f"unrecognized arguments: {rest} (did you mean {close[0]}?)"
        super().error(message)


def settle(namespace: argparse.Namespace) -> tuple[str, ...]:
    """Translate sglang-router's flags in `namespace` to the router's own; return remarks for the log.

    Raises ConfigError for a flag with no equivalent.
    """
    values = vars(namespace).items()
    said = {name.removeprefix(_PREFIX): value for name, value in values if name.startswith(_PREFIX)}
    remarks = [f"{flag} has no effect: {ELSEWHERE[flag][1]}" for flag in said if flag in ELSEWHERE]
    if said.get("--backend", "sglang") != "sglang":
        raise ConfigError(f"--backend {said['--backend']}: this router supports sglang only")
    if (paths := said.get("--ca-cert-paths")) and namespace.ssl_ca_certs is None:
        namespace.ssl_ca_certs = _one_file(paths)
    if (path := said.get("--model-path")) is not None and namespace.tokenizer_path is None:
        if Path(path).is_dir():
            namespace.tokenizer_path = path
        else:
            remarks.append(f"--model-path {path} is not a folder: the servers' own --model-path is used")
    return tuple(remarks)


def _one_file(paths: Sequence[str]) -> Path:
    if len(paths) > 1:
        raise ConfigError("--ca-cert-paths takes one file: put all certificates into it")
    return Path(paths[0])
