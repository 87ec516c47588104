"""Starts the child processes of a CPU server as forks of the first process, which has imported their modules.

SGLang spawns its children, and each child then imports for ten seconds the modules that its parent has
loaded: two thirds of the start, and half a GB per process. SGLang spawns because CUDA does not survive a
fork. Without CUDA, and without a second thread, a fork is safe.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
from multiprocessing import util
from pathlib import Path
from typing import Any

from memserve.engine import plugin
from memserve.engine import sglang_internals as seams

logger = logging.getLogger(__name__)


def fork_children() -> None:
    """Register the hooks, including the scheduler's, because a fork inherits the hooks of this process."""
    import torch
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    # torch reads OMP_NUM_THREADS at import, which happened before the variable was set.
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    plugin.hook_scheduler()
    HookRegistry.register(seams.START_METHOD, fork_if_single_threaded, HookType.AFTER)
    util.register_after_fork(plugin, lambda _: plugin.ignore_signals_in_children())


def fork_if_single_threaded(*_: Any) -> None:
    """Replace SGLang's start method `spawn` by `fork`, unless other threads may hold locks now."""
    if num_threads() == 1:
        multiprocessing.set_start_method("fork", force=True)
    else:
        logger.info("this process has %d threads already, so its children are spawned", num_threads())


def num_threads() -> int:
    """Number of threads of this process, including threads that Python does not know."""
    return sum(1 for _ in Path("/proc/self/task").iterdir())
