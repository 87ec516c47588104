"""Puts benchmark/ on the path: its programs import modules beside them, and so do their tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmark"))
