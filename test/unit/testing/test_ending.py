"""A script's child processes end with the script, whatever ends it. Real processes, cheap ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from memserve.testing.ending import interrupt_on_signals

DEADLINE_S = 20.0
CHILD = "import time\nprint('child up', flush=True)\ntime.sleep(600)\n"
STUBBORN = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + CHILD
SCRIPT = """
import sys, time
from pathlib import Path
from memserve.testing.cluster import Cluster, ServerProcess, wait_for

class Fake(Cluster):
    def __init__(self, log_dir):
        self.servers = {}
        self.router = ServerProcess("child", ["child"], log_dir / "child.log")

    def begin_close(self):
        super().begin_close()
        print("closing", flush=True)

with Fake(Path(sys.argv[1])) as cluster:
    wait_for(lambda: "child up" in cluster.router.output(), [cluster.router], what="the child")
    print(cluster.router.pid, flush=True)
    if sys.argv[2] == "returns":
        sys.exit(0)
    if sys.argv[2] == "fails":
        raise ValueError("failed")
    time.sleep(600)
"""


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    """False for a zombie: a test's container may have no process that reaps it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextmanager
def scripted(
    tmp_path: Path, deed: str = "waits", *, child: str = CHILD, ignored: tuple[signal.Signals, ...] = ()
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A script with one child, whose process id comes with it. It starts with these signals ignored."""
    (tmp_path / "child.py").write_text(child)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}

    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "logs"), deed]
    if ignored:
        names = " ".join(number.name.removeprefix("SIG") for number in ignored)
        command = ["sh", "-c", f"trap '' {names}; exec \"$@\"", "sh", *command]
    process = subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    pid = 0
    try:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        yield process, pid
    finally:
        process.kill()
        process.communicate()
        if pid and is_running(pid):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("deed", ["returns", "fails"])
def test_a_child_has_ended_when_its_script_returns_or_fails(tmp_path: Path, deed: str) -> None:
    with scripted(tmp_path, deed) as (process, child):
        assert process.wait(DEADLINE_S) == (deed == "fails")
        assert not is_running(child)


@pytest.mark.parametrize("ignored", [(), (signal.SIGINT,)], ids=["foreground", "background"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_child_has_ended_when_a_signal_has_ended_its_script(
    tmp_path: Path, number: signal.Signals, ignored: tuple[signal.Signals, ...]
) -> None:
    with scripted(tmp_path, ignored=ignored) as (process, child):
        assert is_running(child)
        process.send_signal(number)
        assert process.wait(DEADLINE_S) != 0
        assert not is_running(child)


def test_a_script_started_by_nohup_still_ignores_sighup(tmp_path: Path) -> None:
    with scripted(tmp_path, ignored=(signal.SIGHUP,)) as (process, _):
        status = Path(f"/proc/{process.pid}/status").read_text()
        ignored = next(line.split()[1] for line in status.splitlines() if line.startswith("SigIgn"))
        assert int(ignored, 16) & 1 << (signal.SIGHUP - 1)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent has ended")
def test_a_child_ends_when_its_script_is_killed(tmp_path: Path) -> None:
    with scripted(tmp_path) as (process, child):
        process.kill()
        until(lambda: not is_running(child))


def test_a_second_signal_kills_a_child_that_does_not_end(tmp_path: Path) -> None:
    with scripted(tmp_path, child=STUBBORN) as (process, child):
        process.send_signal(signal.SIGTERM)
        assert process.stdout is not None
        assert process.stdout.readline() == "closing\n"
        process.send_signal(signal.SIGTERM)
        process.wait(DEADLINE_S)
        assert not is_running(child)


def test_a_handler_of_the_script_stays() -> None:
    own = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGTERM, handler := lambda *_: None)
        interrupt_on_signals()
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, own[0])
        signal.signal(signal.SIGHUP, own[1])
