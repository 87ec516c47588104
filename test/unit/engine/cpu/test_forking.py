"""Conditions under which a CPU server forks its children."""

from __future__ import annotations

import os
import subprocess
import sys

CHOOSE = """
import multiprocessing, threading
from memserve.engine.cpu import forking

multiprocessing.set_start_method("spawn")
release = threading.Event()
for _ in range({num_others}):
    threading.Thread(target=release.wait).start()
forking.fork_if_single_threaded()
release.set()
print(multiprocessing.get_start_method())
"""


def chosen(num_others: int) -> str:
    """The start method in a process with this many additional threads."""
    command = [sys.executable, "-c", CHOOSE.format(num_others=num_others)]
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # keeps numpy from starting threads
    return subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout.strip()


def test_single_threaded_server_forks_its_children() -> None:
    assert chosen(0) == "fork"


def test_multi_threaded_server_spawns_its_children() -> None:
    assert chosen(1) == "spawn"
