"""Makes a torchvision built for CUDA importable beside a torch built for the CPU.

SGLang imports torchvision in every process. The wheel on PyPI is a CUDA build: its compiled part does not
load on a CPU torch, and its Python part then fails on two operators that were never defined. SGLang's
text path calls neither, so it is enough to declare them.

`import torch` calls this module through the `torch.backends` entry point, in spawned children and in
frontend programs alike; site-packages stay unchanged. Knows nothing of SGLang.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import torch

_MISSING = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_keep_alive: list[torch.library.Library] = []


def define_missing_ops() -> None:
    """Declare `torchvision::nms` and `qnms` if torchvision cannot load its own operators here."""
    if torch.version.cuda is None and _torchvision_is_built_for_cuda() and not _keep_alive:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms" + _MISSING)
        library.define("qnms" + _MISSING)
        _keep_alive.append(library)


def _torchvision_is_built_for_cuda() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return False
    version = Path(spec.origin).with_name("version.py")
    return version.is_file() and re.search(r"__version__ = '[^']*\+cu\d", version.read_text()) is not None
