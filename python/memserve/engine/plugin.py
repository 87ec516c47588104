"""Joins MemServe to SGLang inside each of SGLang's processes: registers all hooks.

SGLang calls `register` through the `sglang.srt.plugins` entry point, in the launcher and in every process
that it spawns. The launcher's settings reach these processes in one environment variable.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import pkgutil
import signal
import sys
from dataclasses import asdict, replace
from typing import Any

from memserve.core.errors import MemServeError
from memserve.engine import sglang_internals as seams
from memserve.engine.hooks import admission
from memserve.engine.platform_detect import is_cpu_machine
from memserve.engine.request_seams import TOKENIZER_MODULE
from memserve.engine.settings import SETTINGS_VARIABLE, EngineSettings, process_endpoint


def register() -> None:
    """Register the hooks. In a server that `memserve.launch_server` did not start, only the CPU's hooks.

    A failure ends the process with its reason: SGLang would log it and serve without MemServe.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    launched = os.environ.get(SETTINGS_VARIABLE) is not None
    try:
        seams.check_version()
        if is_cpu_machine():
            from memserve.engine.cpu.attention import register_cpu_attention

            register_cpu_attention()
            _send_from_host_memory()
        if launched:
            ignore_signals_in_children()
            HookRegistry.register(seams.TRANSFER_ENGINE, drop_in(), HookType.REPLACE)
            if seams.SCHEDULER_MODULE in sys.modules:
                hook_scheduler()
            if TOKENIZER_MODULE in sys.modules:
                admission.place()
    except MemServeError as error:
        raise SystemExit(f"memserve: {error}") from error


@functools.cache
def hook_scheduler() -> None:
    """Register the hooks of the process that runs the model, after its module was imported. Idempotent."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from memserve.engine.hooks import containment, time_limits, warm_up
    from memserve.engine.hooks import handoff as handoff_hooks
    from memserve.engine.hooks import pool as pool_hooks

    HookRegistry.register(seams.INTERNAL_STATE, report_state, HookType.AFTER)
    handoff_hooks.place()
    pool_hooks.place()
    containment.place()
    time_limits.place()
    warm_up.place()


def drop_in() -> type[Any]:
    """MemServe's transfer engine with the constructor of SGLang's MooncakeTransferEngine."""
    from memserve.disagg.transfer_engine import TransferEngine

    class DropInTransferEngine(TransferEngine):
        def __init__(self, hostname: str, gpu_id: int | None = None, ib_device: str | None = None) -> None:
            config = replace(EngineSettings.inherited().handoff, host=hostname, ib_device=ib_device or "")
            super().__init__(process_endpoint(), config)

    return DropInTransferEngine


def report_state(output: Any, inquirer: Any, *_: Any) -> Any:
    """Add the model's vocabulary, and the counters of the transfer engine and the memory pool, to the
    scheduler's `/server_info`."""
    from memserve.disagg.transfer_engine import TransferEngine
    from memserve.engine.hooks.pool import linker_of

    state: dict[str, Any] = {"vocab_size": inquirer.model_config.vocab_size}
    engine = pkgutil.resolve_name(seams.SHARED_ENGINE)()
    if isinstance(engine, TransferEngine):
        state["transfer"] = asdict(engine.stats().total)
    linker = linker_of(getattr(inquirer, "tree_cache", None))
    if linker is not None:
        state["pool"] = linker.stats()
    output.internal_state["memserve"] = state
    return output


def ignore_signals_in_children() -> None:
    """In a child: ignore Ctrl-C and SIGTERM, which a terminal or service manager sends to every process.

    The launcher stops its children in order; a child that ended first would count as crashed.
    """
    if multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _send_from_host_memory() -> None:
    """Keep the Mooncake connector from page-locking its indices, which needs CUDA."""
    sender = pkgutil.resolve_name(seams.KV_SENDER)
    sender.supports_host_tensor_indices = False
