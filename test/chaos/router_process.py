"""A router process that is stopped, killed and restarted at the same address."""

from __future__ import annotations

import asyncio
import re
import resource
import signal
from collections.abc import Sequence
from pathlib import Path

from memserve.testing.cluster import ServerProcess, wait_for

SHIFTED = Path(__file__).parent / "shifted_router.py"
_READY = re.compile(r"router ready http=(\S+) control=(\S+)")
_TRACEBACK = re.compile(r"^Traceback.*(?:\n .*)*\n.*", re.MULTILINE)


class RouterProcess:
    """One router at a time, always on the same ports."""

    def __init__(self, log_dir: Path, flags: Sequence[str]) -> None:
        self._log_dir = log_dir
        self._flags = list(flags)
        self._ports = ["--port", "0", "--control-port", "0"]
        self._count = 0
        self.clock = log_dir / "clock"
        """Seconds by which the router's wall clock is ahead."""
        self.url = self.control = ""

    async def start(self) -> None:
        """Return when it serves. Raises ClusterFailed."""
        self._count += 1
        self.clock.parent.mkdir(parents=True, exist_ok=True)
        self.clock.write_text("0")
        log = self._log_dir / f"router-{self._count}.log"
        argv = ["test.chaos.shifted_router", str(self.clock), *self._ports, *self._flags]
        self.process = ServerProcess("router", argv, log)
        await asyncio.to_thread(
            wait_for,
            lambda: _READY.search(self.process.output()),
            [self.process],
            what="the router",
            timeout_s=60,
        )
        found = _READY.search(self.process.output())
        assert found is not None
        self.url, self.control = found.groups()
        self._ports = ["--port", self.url.rsplit(":", 1)[1], "--control-port", self.control.rsplit(":", 1)[1]]

    async def restart(self) -> None:
        """SIGTERM, and start it again."""
        await asyncio.to_thread(self.process.stop)
        await self.start()

    async def kill(self) -> None:
        """SIGKILL."""
        await asyncio.to_thread(self.process.kill)

    async def stop(self) -> None:
        """SIGTERM, and wait for its end."""
        await asyncio.to_thread(self.process.stop)

    async def freeze(self) -> None:
        """SIGSTOP."""
        self.process.send(signal.SIGSTOP)

    async def thaw(self) -> None:
        """SIGCONT."""
        self.process.send(signal.SIGCONT)

    async def fill_disk(self) -> None:
        """Keep the router's files from growing, first of all its log."""
        limit_files(self.process.pid, self.process.log.stat().st_size)

    async def free_disk(self) -> None:
        """End that."""
        limit_files(self.process.pid, None)

    def tracebacks(self) -> list[str]:
        """The exceptions that the routers have logged."""
        logs = [path.read_text(errors="replace") for path in sorted(self._log_dir.glob("router-*.log"))]
        return [one for log in logs for one in _TRACEBACK.findall(log)]


def limit_files(pid: int, num_bytes: int | None) -> None:
    """Limit the size of the files that a process writes; None: no limit."""
    limit = resource.RLIM_INFINITY if num_bytes is None else num_bytes
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
