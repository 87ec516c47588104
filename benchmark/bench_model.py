"""The model that benchmarks serve, and prompts for it. Knows no server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 250
FIRST_TOKEN = 10
"""Past the special ones."""


def make_model() -> Path:
    """The bench model, which stays between runs."""
    path = ROOT / "models" / "bench"
    subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "make_tiny_model.py"), "--size", "bench", str(path)],
        check=True,
        stdout=sys.stderr,
    )
    return path


def random_tokens(draw: Random, count: int) -> list[int]:
    """A prompt that nobody has seen."""
    return draw.choices(range(FIRST_TOKEN, VOCABULARY), k=count)
