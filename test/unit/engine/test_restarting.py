"""Restart of a server in another role: its command line, and a real restart in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from memserve.engine.restarting import argv_as, other_roles
from memserve.wire.messages import Role

PREFILL, DECODE, COLOCATED = Role.PREFILL, Role.DECODE, Role.COLOCATED


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--role prefill --tp 2", "--tp 2 --role decode --port 77"),
        ("--role=prefill --port=1 --tp 2", "--tp 2 --role decode --port 77"),
        (
            "--port 5 --model-path m --role prefill --host h",
            "--model-path m --host h --role decode --port 77",
        ),
        ("", "--role decode --port 77"),
    ],
)
def test_restart_keeps_all_arguments_but_the_role_and_keeps_the_address(argv: str, expected: str) -> None:
    assert argv_as(argv.split(), DECODE, 77) == expected.split()
    assert argv_as(expected.split(), DECODE, 77) == expected.split()


@pytest.mark.parametrize(
    ("argv", "num_nodes", "roles"),
    [
        ("--tp 2", 1, (DECODE, COLOCATED)),
        ("--disaggregation-mode prefill", 1, ()),
        ("--disaggregation-mode=prefill", 1, ()),
        ("--config sglang.yaml", 1, ()),
        ("--tp 16", 2, ()),
    ],
)
def test_restart_offers_the_roles_that_the_flags_allow(
    argv: str, num_nodes: int, roles: tuple[Role, ...]
) -> None:
    assert other_roles(PREFILL, argv.split(), num_nodes) == roles


LAUNCHER = """
import json, os, sys
from memserve.engine.restarting import Restart
from memserve.wire.messages import Role

restart = Restart(sys.argv[1:], dict(os.environ))
print(json.dumps([os.getpid(), sys.flags.utf8_mode, os.environ.get("LEFT_BEHIND"), sys.argv[1:]]), flush=True)
os.environ["LEFT_BEHIND"] = "by the first life"
try:
    if "decode" not in sys.argv:
        restart.want(Role.DECODE, 77)
finally:
    restart.run_if_wanted()
"""


def test_restart_stops_the_process_in_order_and_executes_it_again(tmp_path: Path) -> None:
    """A process that ends normally on SIGTERM, as SGLang does."""
    script = tmp_path / "launcher.py"
    script.write_text("import signal, sys\nsignal.signal(15, lambda *_: sys.exit(0))\n" + LAUNCHER)
    argv = ["--role", "prefill", "--tp", "2"]
    done = subprocess.run(
        [sys.executable, "-X", "utf8", str(script), *argv],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    first, second = map(json.loads, done.stdout.splitlines())
    assert first[0] == second[0], "the same process"
    assert first[1:] == [1, None, argv]
    assert second[1:] == [1, None, ["--tp", "2", "--role", "decode", "--port", "77"]]
