"""Detects a machine without a GPU before SGLang is imported; entry point of SGLang's platform plugin."""

from __future__ import annotations

CPU_ATTENTION = "memserve_cpu"
CPU_PLATFORM = "memserve.engine.cpu.platform.CpuPlatform"


def is_cpu_machine() -> bool:
    """Whether torch finds no GPU, so that servers run on MemServe's CPU platform."""
    import torch

    return not torch.cuda.is_available()


def activate_cpu_platform() -> str | None:
    """The platform class for SGLang to load; None on a machine with a GPU."""
    return CPU_PLATFORM if is_cpu_machine() else None
