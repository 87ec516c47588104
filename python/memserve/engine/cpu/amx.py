"""Keeps bfloat16 from ending the process on machines that announce AMX and then trap on it.

Some hypervisors announce AMX without support. oneDNN uses it, and the first bfloat16 product ends with
SIGILL. Without AMX, oneDNN uses AVX-512 and works. Knows torch only.
"""

from __future__ import annotations

import faulthandler
import os
import resource

import torch

ISA_VARIABLE = "ONEDNN_MAX_CPU_ISA"
BEST_ISA_WITHOUT_AMX = "AVX512_CORE_FP16"


def avoid_faulty_amx() -> bool:
    """Disable AMX in oneDNN if it traps. Returns whether bfloat16 products are safe now.

    Computes a bfloat16 product in a forked child (about 10 ms). If the child dies, sets
    ONEDNN_MAX_CPU_ISA, which child processes inherit. oneDNN reads it once: call this before the first
    product of the process, and before the process has threads, which a fork does not copy.
    """
    if _bfloat16_survives():
        return True
    os.environ[ISA_VARIABLE] = BEST_ISA_WITHOUT_AMX
    return _bfloat16_survives()


def _bfloat16_survives() -> bool:
    child = os.fork()
    if child == 0:
        try:
            faulthandler.disable()
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            torch.set_num_threads(1)
            torch.ones(64, 64, dtype=torch.bfloat16).mm(torch.ones(64, 64, dtype=torch.bfloat16))
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0
