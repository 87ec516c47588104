"""Restarts a server's process in another role, with the same command line, environment and address.

SGLang's disaggregation mode is fixed for the life of a process. So the process stops as on SIGTERM and
then executes itself. The process id stays; the contents of HBM and DRAM are lost.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from memserve.wire.messages import Role

logger = logging.getLogger(__name__)

_FIXES_ROLE = ("--disaggregation-mode", "--config")
"""SGLang's flags that override the role, or may do so."""


def other_roles(role: Role, sglang_argv: Sequence[str], num_nodes: int) -> tuple[Role, ...]:
    """The roles that a server with these flags can change to; none if one process cannot decide it. Pure."""
    if num_nodes > 1 or any(arg.partition("=")[0] in _FIXES_ROLE for arg in sglang_argv):
        return ()
    return tuple(one for one in (Role.PREFILL, Role.DECODE, Role.COLOCATED) if one is not role)


def argv_as(argv: Sequence[str], role: Role, port: int) -> list[str]:
    """`argv` for a server of role `role` at `port`. Pure."""
    kept = []
    rest = iter(argv)
    for arg in rest:
        if arg in ("--role", "--port"):
            next(rest, None)
        elif not arg.startswith(("--role=", "--port=")):
            kept.append(arg)
    return [*kept, "--role", role.value, "--port", str(port)]


@dataclass(slots=True)
class Restart:
    """The next life of this process. Create it before the environment changes."""

    argv: Sequence[str]
    """Arguments of the launcher."""
    environ: Mapping[str, str]
    _next: list[str] | None = None

    def want(self, role: Role, port: int) -> None:
        """Stop this process as SIGTERM does, then restart it as `role` at `port`. Any thread."""
        logger.info("this server becomes role=%s port=%d", role, port)
        self._next = argv_as(self.argv, role, port)
        os.kill(os.getpid(), signal.SIGTERM)

    def run_if_wanted(self) -> None:
        """Call after the server has stopped. Does not return if a restart was requested."""
        if self._next is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            # The interpreter with its own flags, and the module that it runs.
            command = [sys.executable, *sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv) + 1]]
            os.execve(command[0], [*command, *self._next], self.environ)
