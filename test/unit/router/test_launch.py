"""`python -m memserve.launch_router` as a process."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

COMMAND = [sys.executable, "-m", "memserve.launch_router"]


@contextmanager
def launched(*flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A router on free ports, and the lines it prints when it is ready."""
    process = subprocess.Popen([*COMMAND, "--port", "0", *flags], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        yield process, process.stderr.readline() + process.stderr.readline()
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_launch_router_exits_cleanly_on_a_signal(number: signal.Signals) -> None:
    with launched() as (process, lines):
        match = re.search(r"router ready http=(\S+) control=(\S+)", lines)
        assert match
        assert "--router " + match[2] in lines
        with urllib.request.urlopen(match[1] + "/health", timeout=5) as answer:
            assert answer.status == 200
        process.send_signal(number)
        _, errors = process.communicate(timeout=10)
        assert process.returncode == 0
        assert "Traceback" not in errors


def test_launch_router_exits_with_2_on_a_busy_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = str(busy.getsockname()[1])
        for flags in (["--port", port], ["--port", "0", "--control-port", port]):
            done = subprocess.run([*COMMAND, *flags], capture_output=True, text=True, timeout=20, check=False)
            assert done.returncode == 2
            assert len(done.stderr.splitlines()) == 1
            assert port in done.stderr


def test_launch_router_needs_a_cluster_key_off_loopback() -> None:
    command = [*COMMAND, "--host", "0.0.0.0", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 2
    assert "--cluster-key-file" in done.stderr


def test_router_imports_neither_torch_nor_sglang() -> None:
    script = "import sys, memserve.launch_router; print({'torch', 'sglang'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
