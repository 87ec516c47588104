"""Compiles, before the server is ready, the functions of SGLang's sampler that torch compiles at first use.

The first request with such a parameter would stop all others meanwhile, for up to a minute. A CPU server
does not compile them (`server_flags.cpu_environment`).
"""

from __future__ import annotations

import logging
import pkgutil
import time
from typing import Any

from memserve.engine import request_seams as seams

logger = logging.getLogger(__name__)

_BATCH_SIZES = (1, 2)
"""Torch compiles dynamic shapes apart from a size of one."""


def place() -> None:
    """Register the hook, in a process that has a scheduler."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(seams.MODEL_WORKER, warm_up, HookType.AFTER)


def warm_up(_: Any, scheduler: Any) -> None:
    """Call the compiled functions with the shapes and types of the sampler, on the model's device.

    In the grad mode of the scheduler's loop: torch compiles for each mode.
    """
    with pkgutil.resolve_name(seams.GRAD_MODE)():
        _call_compiled(scheduler)


def _call_compiled(scheduler: Any) -> None:
    import torch

    began = time.perf_counter()
    device, vocab_size = scheduler.device, scheduler.model_config.vocab_size
    scale_logits = pkgutil.resolve_name(seams.SCALE_LOGITS)
    sample = pkgutil.resolve_name(seams.SEEDED_SAMPLE)
    is_seeded = pkgutil.resolve_name(seams.EXECUTION)().deterministic.enable_deterministic_inference
    for size in _BATCH_SIZES:
        logits = torch.zeros(size, vocab_size, dtype=torch.float32, device=device)
        scale_logits(logits, torch.ones_like(logits))
        if is_seeded:
            seeds = torch.zeros(size, dtype=torch.int64, device=device)
            sample(torch.log_softmax(logits, -1), seeds, torch.zeros_like(seeds))
    logger.info("the sampler is compiled took_s=%.1f", time.perf_counter() - began)
