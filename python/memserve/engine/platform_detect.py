"""What this machine is, asked before SGLang is imported: its platform plugin starts here."""

from __future__ import annotations

CPU_ATTENTION = "memserve_cpu"
CPU_PLATFORM = "memserve.engine.cpu.platform.CpuPlatform"


def is_cpu_machine() -> bool:
    """Whether torch sees no accelerator here, so that servers run on our CPU platform."""
    import torch

    return not torch.cuda.is_available()


def activate_cpu_platform() -> str | None:
    """The platform class for SGLang to load, or None where there is a GPU to use instead."""
    return CPU_PLATFORM if is_cpu_machine() else None
