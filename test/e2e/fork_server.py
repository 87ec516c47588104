"""Starts servers as forks of one process that has imported their modules, which is most of a start.

Uses multiprocessing's fork server. A forked server behaves as an executed one: a session, an environment
and an output of its own. For machines without a GPU: a GPU context does not survive a fork.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from memserve.testing.ending import ask_for_sigterm

MODULE = "memserve.launch_server"
PRELOADED = (
    MODULE,
    "memserve.engine.server",
    "memserve.engine.linker",
    "memserve.instance.registrar",
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.models.registry",
)


class ForkServer:
    """Forks servers. One per process is enough: multiprocessing has one fork server per process."""

    def __init__(self) -> None:
        """Start to import the modules, in the background."""
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(PRELOADED))
        with pytest.MonkeyPatch.context() as patch:
            # Numpy starts no threads, which a fork would not copy.
            patch.setenv("OMP_NUM_THREADS", "1")
            # Read while SGLang is imported, which is before a server sets it for itself.
            patch.setenv("TORCHDYNAMO_DISABLE", "1")
            forkserver.ensure_running()

    def start(self, argv: Sequence[str], log: Path, env: Mapping[str, str]) -> ForkedProcess:
        """Fork a server with `argv`, the words after `python -m`, and exactly the environment `env`.

        Waits for the imports. Raises ValueError for another module than MODULE.
        """
        if argv[0] != MODULE:
            raise ValueError(f"the fork server imports {MODULE}, not {argv[0]}")
        process = self._context.Process(
            target=_run_as_module, args=(list(argv), log, dict(env)), daemon=False
        )
        log.touch()  # a reader may open it before the fork
        process.start()
        return ForkedProcess(process)


class ForkedProcess:
    """Handle of a forked server, with the interface of `subprocess.Popen`. Any thread."""

    def __init__(self, process: ForkServerProcess) -> None:
        self._process = process
        self._lock = threading.Lock()
        assert process.pid is not None
        self.pid = process.pid

    def poll(self) -> int | None:
        """Exit status; None while the server runs; negative if a signal ended it."""
        with self._lock:
            return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status. Raises subprocess.TimeoutExpired."""
        with self._lock:
            self._process.join(timeout)
            if (status := self._process.exitcode) is None:
                raise subprocess.TimeoutExpired(self._process.name, timeout or 0)
            return status


def _run_as_module(argv: list[str], log: Path, env: dict[str, str]) -> None:
    """In the fork: repeat what the system and the interpreter do when they execute a module."""
    os.setsid()
    ask_for_sigterm()
    with log.open("ab", buffering=0) as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    multiprocessing.process._parent_process = None  # type: ignore[attr-defined]  # not a worker
    for name in os.environ.keys() - env.keys():
        del os.environ[name]
    # Change differing variables only: setproctitle finds the title by the address of the environment.
    os.environ.update(env.items() - os.environ.items())
    sys.orig_argv = [sys.executable, "-m", *argv]
    sys.argv = list(argv)
    from memserve.launch_server import main

    sys.exit(main(argv[1:]))
