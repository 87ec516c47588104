"""A server's process begins anew in another role: the same command line, environment and address.

SGLang's disaggregation mode holds for the life of a process, so this one ends as on SIGTERM, and what
it executes then is itself. The process id stays; HBM, DRAM and what was in them do not.
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
"""SGLang's flags that would win over the role, or might."""


def other_roles(role: Role, sglang_argv: Sequence[str], num_nodes: int) -> tuple[Role, ...]:
    """What a server with these flags can become; nothing if it is not one process's to decide. Pure."""
    if num_nodes > 1 or any(arg.partition("=")[0] in _FIXES_ROLE for arg in sglang_argv):
        return ()
    return tuple(one for one in (Role.PREFILL, Role.DECODE, Role.COLOCATED) if one is not role)


def argv_as(argv: Sequence[str], role: Role, port: int) -> list[str]:
    """`argv`, for a server of that role at that port. Pure."""
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
    """What this process becomes when it has ended. Make one before anything changes the environment."""

    argv: Sequence[str]
    """Of the launcher."""
    environ: Mapping[str, str]
    _next: list[str] | None = None

    def want(self, role: Role, port: int) -> None:
        """End this process as SIGTERM does, and begin anew as `role` at that port. Any thread."""
        logger.info("this server becomes role=%s port=%d", role, port)
        self._next = argv_as(self.argv, role, port)
        os.kill(os.getpid(), signal.SIGTERM)

    def run_if_wanted(self) -> None:
        """Call when everything has ended; does not return if another life is wanted."""
        if self._next is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            # The interpreter with its own flags, and the module it runs.
            command = [sys.executable, *sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv) + 1]]
            os.execve(command[0], [*command, *self._next], self.environ)
