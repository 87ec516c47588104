"""`python -m memserve.launch_router`: one HTTP address in front of a cluster of SGLang servers."""

from __future__ import annotations

import gc
import logging
import resource
import sys
from collections.abc import Sequence
from contextlib import suppress

import uvloop

from memserve.core.errors import ConfigError
from memserve.router.app import serve
from memserve.router.command_line import parse_args
from memserve.router.observability.logs import Logs

logger = logging.getLogger("memserve.launch_router")

USAGE_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a router until it is told to stop; the process's exit code."""
    try:
        asked = parse_args(argv)
        logs = Logs(asked.logs)
        logs.start()
        try:
            for remark in asked.remarks:
                logger.info("%s", remark)
            allow_many_connections()
            collect_seldom()
            uvloop.run(serve(asked.config))
        finally:
            logs.close()
    except ConfigError as error:
        print(f"launch_router: {error}", file=sys.stderr)
        return USAGE_ERROR
    return 0


def allow_many_connections() -> None:
    """As many open files as this process may have: a stream takes up to three."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # where there is no hard limit, the system has one all the same
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def collect_seldom() -> None:
    """Have the garbage collector leave alone what is here to stay, and come by rarely: requests leave next to
    no cycles, and to look for them in a large tree takes longer than to serve many requests."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


if __name__ == "__main__":
    sys.exit(main())
