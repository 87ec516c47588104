"""SGLang's hardware platform for machines without a GPU: no sgl-kernel, no flashinfer, no vllm.

SGLang finds it through the `sglang.srt.platforms` entry point. Knows only the platform interface;
`server_flags` has the flags of a server on this platform.
"""

from __future__ import annotations

import psutil
import torch
from sglang.srt.platforms.interface import PlatformEnum, SRTPlatform

from memserve.engine.platform_detect import CPU_ATTENTION


class CpuPlatform(SRTPlatform):
    """Plain torch on the host's cores and memory.

    `native` dispatch makes every fused operator use its torch implementation; the default capabilities
    (no triton, no graphs) make SGLang use its torch paths elsewhere.
    """

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    def get_device(self, device_id: int = 0) -> torch.device:
        return torch.device("cpu")

    def set_device(self, device: torch.device) -> None:
        """Does nothing: there is one device."""

    def get_device_name(self, device_id: int = 0) -> str:
        return "cpu"

    def get_device_capability(self, device_id: int = 0) -> None:
        return None

    def get_device_total_memory(self, device_id: int = 0) -> int:
        """Bytes of memory of the machine."""
        return int(psutil.virtual_memory().total)

    def get_current_memory_usage(self, device: torch.device | None = None) -> float:
        """Bytes that are not available to a new process."""
        memory = psutil.virtual_memory()
        return float(memory.total - memory.available)

    def get_available_memory(self, device_id: int = 0) -> tuple[int, int]:
        """(free, total) bytes."""
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    def get_default_attention_backend(self) -> str:
        return CPU_ATTENTION

    def get_torch_distributed_backend_str(self) -> str:
        return "gloo"

    def get_dispatch_key_name(self) -> str:
        return "native"
