"""Starts a CPU server's other processes as forks of the first, which has imported all they need.

SGLang spawns them, and each then imports for ten seconds what its parent has loaded already: two
thirds of the time and the work of a start, and half a GB per process. Spawning is for CUDA's sake,
which does not survive a fork; without it, and without a second thread, a fork loses nothing.
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
    """Place the hooks; the scheduler's among them, since a fork has this process's. To be applied."""
    import torch
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    # Read by a process when it imports torch, which this one had to before it was set.
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    plugin.hook_scheduler()
    HookRegistry.register(seams.START_METHOD, fork_if_single_threaded, HookType.AFTER)
    util.register_after_fork(plugin, lambda _: plugin.ignore_signals_in_children())


def fork_if_single_threaded(*_: Any) -> None:
    """Called when SGLang has just chosen to spawn, which stands if a fork might copy a held lock."""
    if num_threads() == 1:
        multiprocessing.set_start_method("fork", force=True)
    else:
        logger.info("this process has %d threads already, so its children are spawned", num_threads())


def num_threads() -> int:
    """Of this process, those that Python does not know included."""
    return sum(1 for _ in Path("/proc/self/task").iterdir())
