"""Hooks that repair two races in SGLang's handoff from prefill to decode.

Status update: the scheduler opens a request while the thread that receives messages of decode records that
decode is ready for it. Both check whether the request is known, then write. The later write can undo the
earlier one; the request and its decode then wait until SGLang gives up after five minutes.

Status query: a sending thread checks that a request is known, then reads its status. Between the two the
scheduler, after the last send, can forget the request: a KeyError, once in some hundred requests on a busy
machine. The error ended the thread, one of a few, and every later request of that thread waited for ever on
a server that looked healthy.
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
    """Let only one thread at a time read and change a request's status."""
    with _updating:
        return original(*args, **kwargs)


def status_of_room(original: Callable[..., Any], manager: Any, bootstrap_room: int) -> Any:
    """Report a request that was just forgotten as failed, as SGLang's first check does: SGLang then sends no
    more for it and clears the rest of its state."""
    try:
        return original(manager, bootstrap_room)
    except KeyError:
        from sglang.srt.disaggregation.base.conn import KVPoll

        return KVPoll.Failed


def end_with_thread(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """End the process with the thread: the router then uses other servers than one that cannot send."""
    try:
        return original(*args, **kwargs)
    except Exception:
        logger.exception("the thread that sends KV to decode failed; this process cannot go on")
        os._exit(1)
