"""A cluster of real processes on this machine: one router and any number of servers behind it.

For tests, benchmarks and the demo. The system picks every port; every process logs to a file of its own.
Knows the two launch commands, and nothing of their code.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

from memserve.core.errors import MemServeError
from memserve.testing.ending import start_child
from memserve.wire.messages import Role

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 30.0
POLL_S = 0.05


class ClusterFailed(MemServeError):
    """A process ended, or was not ready in time. The text contains the end of its log."""


class RunningProcess(Protocol):
    """A process that this module started; the interface of subprocess.Popen."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...


Start = Callable[[Sequence[str], Path, Mapping[str, str]], RunningProcess]
"""Starts a process from the words after `python -m`, the file for its output, and its environment."""


def start_process(argv: Sequence[str], log: Path, env: Mapping[str, str]) -> RunningProcess:
    """Start a process in a session of its own, so that it receives only the signals that are sent here.

    It ends with this process, whose SIGTERM raises KeyboardInterrupt from now on.
    """
    with log.open("wb") as output:
        return start_child(
            [sys.executable, "-m", *argv],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )


class ServerProcess:
    """One process of the cluster. Its output goes to a file."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        log: Path,
        env: Mapping[str, str] | None = None,
        start: Start = start_process,
    ) -> None:
        """Starts the process."""
        self.name = name
        self.argv = ["-m", *argv]
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)  # a predecessor that still runs keeps its own file
        self._running = start(argv, log, {**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})})

    @property
    def pid(self) -> int:
        return self._running.pid

    @property
    def status(self) -> int | None:
        """Exit status; None while the process runs; negative if a signal ended it."""
        return self._running.poll()

    def output(self) -> str:
        """The output so far."""
        return self.log.read_text(errors="replace")

    def send(self, signum: signal.Signals) -> None:
        """Send a signal to the process itself. Does nothing if it has ended."""
        if self.status is None:
            os.kill(self.pid, signum)

    def wait(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """The exit status. Raises ClusterFailed if the process does not end in time."""
        try:
            return self._running.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise ClusterFailed(f"{self.name} did not end within {timeout_s:g} s{self._log_tail()}") from None

    def stop(self) -> int:
        """Send SIGTERM; after the timeout, SIGKILL to its whole session. Returns the exit status."""
        self.send(signal.SIGTERM)
        try:
            return self.wait()
        except ClusterFailed:
            self.kill()
            return self.wait()

    def kill(self) -> None:
        """Send SIGKILL to the process and all of its children, as if the machine failed."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._running.wait()

    def fail_if_ended(self) -> None:
        """Raises ClusterFailed if the process has ended."""
        if self.status is not None:
            raise ClusterFailed(f"{self.name} ended with status {self.status}{self._log_tail()}")

    def _log_tail(self) -> str:
        lines = "\n  ".join(self.output().splitlines()[-15:])
        return f"; the end of {self.log}:\n  {lines}"


class Cluster:
    """A router and its servers. A context manager that stops all processes it started."""

    def __init__(
        self, log_dir: Path, *, router_flags: Sequence[str] = (), start: Start = start_process
    ) -> None:
        """Start the router on free ports. `start` starts the SGLang servers.

        Raises ClusterFailed if the router does not start.
        """
        self.log_dir = log_dir
        self._start = start
        self.servers: dict[str, ServerProcess] = {}
        argv = ["memserve.launch_router", "--port", "0", "--control-port", "0", *router_flags]
        self.router = ServerProcess("router", argv, log_dir / "router.log")
        ready = re.compile(r"router ready http=(\S+) control=(\S+)")
        try:
            wait_for(lambda: ready.search(self.router.output()), [self.router], what="the router")
        except BaseException:
            self.close()
            raise
        match = ready.search(self.router.output())
        assert match is not None
        self.url, self.control = match.groups()

    def launch(
        self, name: str, role: Role, model: Path, *flags: str, env: dict[str, str] | None = None
    ) -> ServerProcess:
        """Start a server under `name`. It registers after its warm-up (see `wait_ready`)."""
        argv = ["memserve.launch_server", "--role", role, "--router", self.control, "--instance-id", name]
        argv += ["--model-path", str(model), *flags]
        self.servers[name] = ServerProcess(name, argv, self.log_dir / f"{name}.log", env, self._start)
        return self.servers[name]

    def launch_memory(self, name: str, dram_gib: float, *flags: str) -> ServerProcess:
        """Start a memory server under `name`. It registers as the other servers do."""
        argv = ["memserve.launch_server", "--role", Role.MEMORY, "--router", self.control]
        argv += ["--instance-id", name, "--dram-gib", str(dram_gib), *flags]
        self.servers[name] = ServerProcess(name, argv, self.log_dir / f"{name}.log")
        return self.servers[name]

    def wait_ready(
        self, progress: Callable[[ServerProcess], None] | None = None, timeout_s: float = START_TIMEOUT_S
    ) -> None:
        """Return when all servers have registered. Calls `progress` with each server that registers."""
        waiting = dict(self.servers)
        deadline = time.monotonic() + timeout_s
        while waiting:
            left = deadline - time.monotonic()
            wait_for(
                lambda: any(_is_registered(process) for process in waiting.values()),
                [self.router, *waiting.values()],
                what=", ".join(waiting),
                timeout_s=left,
            )
            for process in [each for each in waiting.values() if _is_registered(each)]:
                del waiting[process.name]
                if progress is not None:
                    progress(process)

    def server_urls(self) -> list[str]:
        """URLs of the SGLang servers that the router knows now."""
        with urllib.request.urlopen(f"{self.url}/workers", timeout=30) as answer:
            return [worker["url"] for worker in json.load(answer)["workers"]]

    def moved_bytes(self) -> int:
        """Bytes that the transfer engines of all servers have written so far."""
        with urllib.request.urlopen(f"{self.url}/server_info", timeout=30) as answer:
            workers = json.load(answer)["workers"]
        states = [state for worker in workers for state in worker["server_info"]["internal_states"]]
        return sum(state["memserve"].get("transfer", {"num_bytes": 0})["num_bytes"] for state in states)

    def begin_close(self) -> None:
        """Send SIGTERM to all processes and return; a server takes idle seconds to stop. See `close`."""
        for process in [*self.servers.values(), self.router]:
            process.send(signal.SIGTERM)

    def close(self) -> None:
        """Stop all processes in parallel; if that is interrupted, kill them. Idempotent."""
        processes = [*self.servers.values(), self.router]
        try:
            self.begin_close()
            for process in processes:
                process.stop()
        except BaseException:
            for process in processes:
                process.kill()
            raise

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def wait_for(
    condition: Callable[[], object],
    needed: Sequence[ServerProcess] = (),
    *,
    what: str,
    timeout_s: float = START_TIMEOUT_S,
) -> None:
    """Return when `condition` holds. Raises ClusterFailed if a needed process ends, or after the timeout."""
    for _ in _until(timeout_s):
        if condition():
            return
        for process in needed:
            process.fail_if_ended()
    names = ", ".join(str(process.log) for process in needed)
    raise ClusterFailed(f"waited {timeout_s:.0f} s for {what} without success (logs: {names})")


def is_ready(url: str) -> bool:
    """Whether a server or a router answers its readiness check with 200."""
    try:
        with urllib.request.urlopen(f"{url}/readiness", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _is_registered(process: ServerProcess) -> bool:
    """Whether the process has logged its registration. A memory server registers pools only."""
    kind = "pool" if Role.MEMORY in process.argv else "instance"
    line = rf" registered router=\S+ {kind}={re.escape(process.name)}$"
    return re.search(line, process.output(), re.MULTILINE) is not None


def _until(timeout_s: float) -> Iterator[None]:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        yield
        time.sleep(POLL_S)
