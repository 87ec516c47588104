"""The model that benchmarks serve, and prompts for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parent.parent
ROOM = ("--mem-fraction-static", "0.8")
"""For servers that start together: SGLang attributes memory that other servers load meanwhile to its own
weights, and a small share would leave no room for KV. --max-total-tokens alone sets the amount of KV."""
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
    """A new prompt, which no cache has."""
    return draw.choices(range(FIRST_TOKEN, VOCABULARY), k=count)
