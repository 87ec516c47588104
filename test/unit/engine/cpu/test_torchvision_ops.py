"""torchvision imports beside a CPU torch, in a process without MemServe."""

from __future__ import annotations

import subprocess
import sys

import torch

from memserve.engine.cpu.torchvision_ops import define_missing_ops


def test_torchvision_imports_in_a_fresh_process() -> None:
    code = (
        "import torchvision, sys; assert not any(name.startswith('memserve.router') for name in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_torchvision_op_definition_is_idempotent() -> None:
    define_missing_ops()
    define_missing_ops()
    assert hasattr(torch.ops.torchvision, "nms")
