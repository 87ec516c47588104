"""For every test: the small model, made once and kept between runs; and the same examples in each run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

# SGLang compiles its page hash at the first request that needs it, anew for every place it is installed in:
# kept apart, that is once. Inherited by servers.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))

settings.register_profile("memserve", derandomize=True, deadline=None)
settings.load_profile("memserve")


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """A Llama-shaped model directory with random weights."""
    directory = ROOT / "models" / "tiny"
    script = ROOT / "scripts" / "make_tiny_model.py"
    subprocess.run([sys.executable, str(script), str(directory)], check=True, stdout=subprocess.DEVNULL)
    return directory
