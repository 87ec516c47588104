"""The flags of `sglang-router`, so that a launch line that was written for it starts this router.

    same name, same meaning     the router's own flags; not in these tables
    same meaning, other name    ALIASES, SWITCHES
    nothing to do here          ELSEWHERE: accepted, and said what does that job instead

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
"""Its policies with another name here; `bucket` spreads prompts by length, `least_load` by their work."""

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
"""Flags without a value, and what they set. That there are pairs is seen from the servers."""

_TREE = "the prompt tree weighs queues and caches in one prediction: no thresholds; see --policy"
_FORGETS = "the prompt tree forgets what instances evict, and what was used longest ago: --tree-budget-mib"
_JOINS = "the router serves at once, and each server as soon as it answers, however long that takes"
_HEALTH = "a server that a request finds gone is out at once, and in again when a probe finds it well"
_ENGINE = "the servers do this: give the flag to them"
_CACHED = "what was tokenized is always remembered"
_STATELESS = "no conversations are stored here: there is no /v1/responses or /v1/conversations"
_ADMIN = "management is for who has a key of --admin-api-key-file"

ELSEWHERE: dict[str, tuple[str | None, str]] = {
    "--cache-threshold": (None, _TREE),
    "--balance-abs-threshold": (None, _TREE),
    "--balance-rel-threshold": (None, _TREE),
    "--bucket-adjust-interval-secs": (None, _TREE),
    "--eviction-interval-secs": (None, _FORGETS),
    "--max-tree-size": (None, _FORGETS),
    "--max-idle-secs": (None, "sessions are hashed to instances, and nothing is kept of them"),
    "--assignment-mode": (None, "sessions are hashed to instances, and nothing is kept of them"),
    "--dp-aware": (
        "0",
        "a server has its data-parallel ranks share its requests; their caches are told apart",
    ),
    "--enable-igw": ("0", "several models are served always, by the field `model`"),
    "--mini-lb": ("0", "there is one router, for one machine as for many"),
    "--worker-startup-timeout-secs": (None, _JOINS),
    "--worker-startup-check-interval": (None, _JOINS),
    "--retry-backoff-multiplier": (None, "the wait doubles with each try"),
    "--retry-jitter-factor": (None, "a wait is drawn between half of the backoff and all of it"),
    "--cb-success-threshold": (None, "one request that is answered closes a breaker"),
    "--cb-window-duration-secs": (None, "a breaker counts failures in a row"),
    "--health-failure-threshold": (None, _HEALTH),
    "--health-success-threshold": (None, _HEALTH),
    "--health-check-endpoint": (None, "servers are asked at /health"),
    "--disable-health-check": ("0", "a server is checked before it is used: --health-check-interval-secs"),
    "--chat-template": (
        None,
        "the servers' own is used, if they confirm that chats are read as they do",
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
    "--control-plane-audit-enabled": ("0", "changes of the cluster are logged always"),
    "--jwt-issuer": (None, _ADMIN),
    "--jwt-audience": (None, _ADMIN),
    "--jwt-jwks-uri": (None, _ADMIN),
    "--jwt-role-mapping": ("*", _ADMIN),
}
"""By flag: how many values it has (argparse's nargs; "0": it is a switch), and what does that job here."""

_PREFIX = "_sglang_router_"


class CompatParser(argparse.ArgumentParser):
    """Takes both routers' flags, and suggests one for what is neither's."""

    def add_compatible(self) -> None:
        """Take the other router's flags too, once all of one's own are there."""
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
        """End the process, with a suggestion where a flag is not known."""
        kind, _, rest = message.partition("unrecognized arguments: ")
        flag = rest.split(" ")[0].partition("=")[0]
        known = [name for action in self._actions for name in action.option_strings]
        if not kind and (close := difflib.get_close_matches(flag, known, 1)):
            message = f"unrecognized arguments: {rest} (did you mean {close[0]}?)"
        super().error(message)


def settle(namespace: argparse.Namespace) -> tuple[str, ...]:
    """Bring what was said in the other router's words into this one's; what is to be logged of it.

    Raises ConfigError for what cannot be done without.
    """
    values = vars(namespace).items()
    said = {name.removeprefix(_PREFIX): value for name, value in values if name.startswith(_PREFIX)}
    remarks = [f"{flag} has nothing to do here: {ELSEWHERE[flag][1]}" for flag in said if flag in ELSEWHERE]
    if said.get("--backend", "sglang") != "sglang":
        raise ConfigError(f"--backend {said['--backend']}: servers here are SGLang's")
    if (paths := said.get("--ca-cert-paths")) and namespace.ssl_ca_certs is None:
        namespace.ssl_ca_certs = _one_file(paths)
    if (path := said.get("--model-path")) is not None and namespace.tokenizer_path is None:
        if Path(path).is_dir():
            namespace.tokenizer_path = path
        else:
            remarks.append(f"--model-path {path} is no folder: the servers' own --model-path is used")
    return tuple(remarks)


def _one_file(paths: Sequence[str]) -> Path:
    if len(paths) > 1:
        raise ConfigError("--ca-cert-paths takes one file here: put all certificates into it")
    return Path(paths[0])
