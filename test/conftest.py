"""Fixtures for every test: the small model, made once and kept between runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """A Llama-shaped model directory with random weights."""
    directory = ROOT / "models" / "tiny"
    script = ROOT / "scripts" / "make_tiny_model.py"
    subprocess.run([sys.executable, str(script), str(directory)], check=True, stdout=subprocess.DEVNULL)
    return directory
