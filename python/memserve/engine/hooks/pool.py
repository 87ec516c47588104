"""Hooks that the memory pool puts around methods of SGLang's scheduler and cache.

A hook does nothing in a server whose cache has no `MemPoolLinker`. `plugin.py` calls `place`.
"""

from __future__ import annotations

import logging
import pkgutil
from collections.abc import Callable
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

from memserve.engine import sglang_internals as seams
from memserve.engine.hbm_events import ExtraKeys, HbmPublisher, is_ours, register_publisher
from memserve.engine.linker import MemPoolLinker, NodeTransfer

logger = logging.getLogger(__name__)

DRAM_GIB = "memserve_dram_gib"

_ended_bootstrap: ContextVar[str | None] = ContextVar("ended_bootstrap", default=None)
"""`host:port` of the prefill of a request that has ended, while SGLang offloads its pages."""


def place() -> None:
    """Register the hooks, in a process that has a scheduler."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(seams.OFFLOAD_NODE, describe_offload, HookType.BEFORE)
    HookRegistry.register(seams.CHECKPOINT, note_ended_request, HookType.AROUND)
    HookRegistry.register(seams.ARRIVAL, record_prompt_keys, HookType.BEFORE)
    HookRegistry.register(seams.DECODE_QUEUE, release_offloaded, HookType.BEFORE)
    HookRegistry.register(seams.UPDATE_HANDLERS, offer_resize, HookType.AFTER)
    HookRegistry.register(seams.EXTRA_KEY_NAMES, name_extra_keys, HookType.AFTER)
    HookRegistry.register(seams.EVENTS_PUBLISHER, join_hbm_events, HookType.AFTER)
    HookRegistry.register(seams.BATCH_RESULT, publish_hbm_events, HookType.AFTER)
    register_publisher()


def linker_of(tree_cache: Any) -> MemPoolLinker | None:
    """The `MemPoolLinker` under this radix cache, or None."""
    linker = getattr(getattr(tree_cache, "linker", None), "cache_linker", None)
    return linker if isinstance(linker, MemPoolLinker) else None


def describe_offload(wrapper: Any, node_id: Any, transfers: Any) -> None:
    """Add to a node's transfer the page before it and, if its request has ended, the request's prefill."""
    if linker_of(wrapper.cache) is not None:
        before = wrapper.cache.get_prefix_hash_values(node_id)
        (transfer,) = transfers
        transfers[:] = [
            NodeTransfer(
                **vars(transfer), parent=before[-1] if before else None, bootstrap=_ended_bootstrap.get()
            )
        ]


def note_ended_request(original: Callable[..., Any], cache: Any, req: Any, **kwargs: Any) -> Any:
    """Note which prefill lacks the pages that are offloaded because `req` has ended."""
    is_ended = linker_of(cache) is not None and req.finished() and req.bootstrap_host is not None
    token = _ended_bootstrap.set(f"{req.bootstrap_host}:{req.bootstrap_port}" if is_ended else None)
    try:
        return original(cache, req, **kwargs)
    finally:
        _ended_bootstrap.reset(token)


def record_prompt_keys(scheduler: Any, req: Any, *_: Any, **__: Any) -> None:
    """Tell the router the keys of a request's prompt, if the router asks for them."""
    linker = linker_of(scheduler.tree_cache)
    if linker is not None and linker.agent.wants_prompt_keys:
        linker.record_prompt_keys(req)


def release_offloaded(scheduler: Any) -> None:
    """Unlock pages that are in DRAM by now: SGLang's decode loop does so only for its own second tier."""
    if linker_of(scheduler.tree_cache) is not None:
        scheduler.tree_cache.check_hicache_events()


def offer_resize(handlers: Any, controller: Any) -> Any:
    """Let `/set_internal_state` set `memserve_dram_gib`, the DRAM of all ranks together."""
    linker = linker_of(controller.scheduler.tree_cache)
    if linker is not None:
        handler = pkgutil.resolve_name(seams.UPDATE_HANDLER)
        handlers[DRAM_GIB] = handler(_check_gib, lambda _, gib: linker.agent.resize(int(gib * 2**30)))
    return handlers


def name_extra_keys(_: Any, scheduler: Any) -> None:
    """Make the events of the cache, which SGLang creates next, carry the extra key of their blocks."""
    if is_ours(pkgutil.resolve_name(seams.OBSERVABILITY)().kv_events_config):
        scheduler.kv_event_lora_names = ExtraKeys()


def join_hbm_events(_: Any, scheduler: Any) -> None:
    """Report the blocks in HBM to the pool, on the rank that publishes events."""
    linker, events = linker_of(scheduler.tree_cache), scheduler.kv_events_publisher
    if linker is None:
        return
    if isinstance(events.kv_event_publisher, HbmPublisher):
        linker.report_hbm(events.kv_event_publisher)
        # SGLang sends numbers of its own with its events, to a socket without a reader.
        events.send_metrics_from_scheduler = SimpleNamespace(closed=True)
    elif not is_ours(events.kv_events_config):
        logger.info("hbm is not reported: --kv-events-config asks for something else")


def publish_hbm_events(_: Any, scheduler: Any, *__: Any) -> None:
    """Publish the changes of each batch: SGLang publishes after each prefill, but only every 40th decode."""
    if isinstance(scheduler.kv_events_publisher.kv_event_publisher, HbmPublisher):
        scheduler.kv_events_publisher.publish_kv_events()


def _check_gib(name: str, gib: Any) -> None:
    if not isinstance(gib, int | float) or not gib > 0:
        raise pkgutil.resolve_name(seams.UPDATE_REJECTED)(f"{name} is a number above 0, not {gib!r}")
