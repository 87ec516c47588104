"""Repairs of SGLang's handoff from prefill to decode, put around its own methods.

The scheduler opens a request while the thread that hears from decode notes that decode is ready for it.
Each looks whether the request is known, then writes; the later one may undo the other, and the request
waits, its decode with it, until SGLang gives it up after five minutes.

A sending thread asks whether a request is known and then for its status, while the scheduler, who sees that
all is sent, forgets the request: a KeyError, once in some hundred requests on a busy machine. It ended the
thread, one of a few, and every later request that fell to it waited for ever, on a server that seemed well.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import Any

from memserve.engine import sglang_internals as seams

logger = logging.getLogger(__name__)
_updating = threading.RLock()


def place() -> None:
    """Register the hooks, in a process that has a scheduler."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(seams.ROOM_UPDATE, update_alone, HookType.AROUND)
    HookRegistry.register(seams.ROOM_STATUS, status_of_room, HookType.AROUND)
    HookRegistry.register(seams.TRANSFER_WORKER, end_with_thread, HookType.AROUND)


def update_alone(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """One thread at a time looks at a request's status and changes it."""
    with _updating:
        return original(*args, **kwargs)


def status_of_room(original: Callable[..., Any], manager: Any, bootstrap_room: int) -> Any:
    """A request that was forgotten a moment ago has failed, as SGLang has it where it looks first: nothing
    more is sent for it, and what is left of it is cleared."""
    try:
        return original(manager, bootstrap_room)
    except KeyError:
        from sglang.srt.disaggregation.base.conn import KVPoll

        return KVPoll.Failed


def end_with_thread(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A server that cannot send any more is no server: the router does its requests elsewhere."""
    try:
        return original(*args, **kwargs)
    except Exception:
        logger.exception("the thread that sends KV to decode failed; this process cannot go on")
        os._exit(1)
