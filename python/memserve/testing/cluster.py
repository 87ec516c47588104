"""A whole cluster as real processes on this machine: one router and any SGLang servers behind it.

For tests, benchmarks and the demo. Every port comes from the system; every process logs to its own
file. Knows the two launch commands and nothing of what is inside them.
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
from memserve.wire.messages import Role

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 30.0
POLL_S = 0.05


class ClusterFailed(MemServeError):
    """A process ended, or did not get ready in time; the text has the end of its log."""


class RunningProcess(Protocol):
    """A process that was started here, as subprocess describes it."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...


Start = Callable[[Sequence[str], Path, Mapping[str, str]], RunningProcess]
"""From what comes after `python -m`, the file for the output, and the environment."""


def executed(argv: Sequence[str], log: Path, env: Mapping[str, str]) -> RunningProcess:
    """In a session of its own, so that it gets only the signals sent here."""
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", *argv],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )


class ServerProcess:
    """One process of the cluster, its output in a file."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        log: Path,
        env: Mapping[str, str] | None = None,
        start: Start = executed,
    ) -> None:
        """Starts at once."""
        self.name = name
        self.argv = ["-m", *argv]
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)  # a predecessor that has yet to stop goes on writing to its own
        self._running = start(argv, log, {**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})})

    @property
    def pid(self) -> int:
        return self._running.pid

    @property
    def status(self) -> int | None:
        """Exit status, or None while it runs; negative if a signal ended it."""
        return self._running.poll()

    def output(self) -> str:
        """Everything it has written so far."""
        return self.log.read_text(errors="replace")

    def send(self, signum: signal.Signals) -> None:
        """Signal the process itself; one that has ended is left alone."""
        if self.status is None:
            os.kill(self.pid, signum)

    def wait(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Its exit status. Raises ClusterFailed if it has not ended by then."""
        try:
            return self._running.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise ClusterFailed(
                f"{self.name} did not end within {timeout_s:g} s{self._last_words()}"
            ) from None

    def stop(self) -> int:
        """SIGTERM, then SIGKILL for all of its session if that is not obeyed in time."""
        self.send(signal.SIGTERM)
        try:
            return self.wait()
        except ClusterFailed:
            self.kill()
            return self.wait()

    def kill(self) -> None:
        """SIGKILL for the process and all it has started, as a machine that goes down would."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._running.wait()

    def fail_if_ended(self) -> None:
        """Raises ClusterFailed if the process is no longer there."""
        if self.status is not None:
            raise ClusterFailed(f"{self.name} ended with status {self.status}{self._last_words()}")

    def _last_words(self) -> str:
        lines = "\n  ".join(self.output().splitlines()[-15:])
        return f"; the end of {self.log}:\n  {lines}"


class Cluster:
    """A router and its servers. A context manager that stops all it has started."""

    def __init__(self, log_dir: Path, *, router_flags: Sequence[str] = (), start: Start = executed) -> None:
        """Start the router, on free ports; SGLang servers will be started by `start`.

        Raises ClusterFailed if it cannot start.
        """
        self.log_dir = log_dir
        self._start = start
        self.servers: dict[str, ServerProcess] = {}
        argv = ["memserve.launch_router", "--port", "0", "--control-port", "0", *router_flags]
        self.router = ServerProcess("router", argv, log_dir / "router.log")
        ready = re.compile(r"router ready http=(\S+) control=(\S+)")
        try:
            wait_for(lambda: ready.search(self.router.output()), [self.router], what="the router")
        except ClusterFailed:
            self.close()
            raise
        match = ready.search(self.router.output())
        assert match is not None
        self.url, self.control = match.groups()

    def launch(
        self, name: str, role: Role, model: Path, *flags: str, env: dict[str, str] | None = None
    ) -> ServerProcess:
        """Start a server under `name`; it registers itself when it is warm (see `wait_ready`)."""
        argv = ["memserve.launch_server", "--role", role, "--router", self.control, "--instance-id", name]
        argv += ["--model-path", str(model), *flags]
        self.servers[name] = ServerProcess(name, argv, self.log_dir / f"{name}.log", env, self._start)
        return self.servers[name]

    def launch_memory(self, name: str, dram_gib: float, *flags: str) -> ServerProcess:
        """Start a server under `name` that lends DRAM; ready as the others are."""
        argv = ["memserve.launch_server", "--role", Role.MEMORY, "--router", self.control]
        argv += ["--instance-id", name, "--dram-gib", str(dram_gib), *flags]
        self.servers[name] = ServerProcess(name, argv, self.log_dir / f"{name}.log")
        return self.servers[name]

    def wait_ready(
        self, progress: Callable[[ServerProcess], None] | None = None, timeout_s: float = START_TIMEOUT_S
    ) -> None:
        """Return when all servers have registered. `progress` is called for each that just did."""
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
        """Of the SGLang servers that the router knows now."""
        with urllib.request.urlopen(f"{self.url}/workers", timeout=30) as answer:
            return [worker["url"] for worker in json.load(answer)["workers"]]

    def moved_bytes(self) -> int:
        """Bytes that the transfer engines of all servers have written so far."""
        with urllib.request.urlopen(f"{self.url}/server_info", timeout=30) as answer:
            workers = json.load(answer)["workers"]
        states = [state for worker in workers for state in worker["server_info"]["internal_states"]]
        return sum(state["memserve"].get("transfer", {"num_bytes": 0})["num_bytes"] for state in states)

    def begin_close(self) -> None:
        """Tell everything to stop, which takes a server seconds in which it does nothing; see `close`."""
        for process in [*self.servers.values(), self.router]:
            process.send(signal.SIGTERM)

    def close(self) -> None:
        """Stop everything, all at once. Idempotent."""
        self.begin_close()
        for process in [*self.servers.values(), self.router]:
            process.stop()

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
    """Return once `condition` holds. Raises ClusterFailed on a needed process's end, or too late."""
    for _ in _until(timeout_s):
        if condition():
            return
        for process in needed:
            process.fail_if_ended()
    names = ", ".join(str(process.log) for process in needed)
    raise ClusterFailed(f"waited {timeout_s:.0f} s in vain for {what} (logs: {names})")


def is_ready(url: str) -> bool:
    """Whether a server or router answers its readiness check with 200."""
    try:
        with urllib.request.urlopen(f"{url}/readiness", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _is_registered(process: ServerProcess) -> bool:
    """A server's pools register long before it does; a memory instance is nothing but its pools."""
    kind = "pool" if Role.MEMORY in process.argv else "instance"
    line = rf" registered router=\S+ {kind}={re.escape(process.name)}$"
    return re.search(line, process.output(), re.MULTILINE) is not None


def _until(timeout_s: float) -> Iterator[None]:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        yield
        time.sleep(POLL_S)
