"""`python -m test.chaos.shifted_router FILE ...`: a router whose wall clock is FILE's seconds ahead."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from memserve.launch_router import main

_clock = time.time


def shift(file: Path) -> None:
    """Shift the wall clock of this process."""
    time.time = lambda: _clock() + float(file.read_text() or 0)


if __name__ == "__main__":
    shift(Path(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
