"""Runs SGLang's HTTP server in this process: its arguments, its start and its end.

Knows the SGLang calls that make a server, and notifies a `Registrar` when it is ready and when it stops.
"""

from __future__ import annotations

import argparse
import logging
import os
import pkgutil
import signal
import threading
import warnings
from pathlib import Path
from typing import Any, NoReturn

from memserve.core.caching import CachingMode
from memserve.core.errors import ConfigError
from memserve.core.hosts import can_listen, is_loopback, keep_port
from memserve.engine import server_flags
from memserve.engine import sglang_internals as seams
from memserve.engine.cpu import forking
from memserve.engine.cpu.amx import avoid_faulty_amx
from memserve.engine.hooks import admission
from memserve.engine.platform_detect import is_cpu_machine
from memserve.engine.settings import EngineSettings
from memserve.instance.metrics import CONTENT_TYPE, exposition
from memserve.instance.registrar import Registrar
from memserve.wire.messages import Role

logger = logging.getLogger(__name__)

OWN_ADDRESS = "SGLANG_HOST_IP"
"""The environment variable from which SGLang reads its own address."""


def prepare(role: Role, caching: CachingMode, settings: EngineSettings, argv: list[str]) -> Any:
    """SGLang's server arguments: MemServe's flags for `role` and this machine, then the user's `argv`.

    Sets the environment that SGLang's processes inherit. Raises ConfigError for another version of SGLang,
    for a flag that SGLang does not accept, and for a model that does not exist.
    """
    seams.check_version()
    _check_model(argv)
    settings.export()
    ports = server_flags.FreePorts(http=keep_port(), bootstrap=keep_port())
    flags = server_flags.role_flags(role, caching, ports)
    environment = server_flags.guard_environment(os.environ)
    on_cpu = is_cpu_machine()
    if on_cpu:
        _quiet_import_warnings()
        avoid_faulty_amx()
        flags += server_flags.cpu_flags(role)
        environment |= server_flags.cpu_environment(role, os.cpu_count() or 1, argv, os.environ)
    os.environ.update(environment)

    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs, prepare_server_args

    load_plugins()
    server_args = prepare_server_args([*flags, *_checked(argv, ServerArgs)])
    if not can_listen(server_args.host, server_args.port):
        raise ConfigError(
            f"--port {server_args.port}: cannot listen there on {server_args.host}, is it in use? "
            "(without the flag a free one is taken)"
        )
    os.environ[OWN_ADDRESS] = reachable_host(server_args.host)
    if on_cpu:
        chosen = [*flags, *(f"{name}={value}" for name, value in environment.items())]
        logger.info("no GPU here, so: %s (flags given on the command line win)", " ".join(chosen))
    try:
        server_args.resolve_once()
    except (ValueError, OSError, AssertionError) as error:
        logger.debug("SGLang refused its arguments", exc_info=True)
        raise ConfigError(" ".join(str(error).split())) from error
    return server_args


def reachable_host(host: str) -> str:
    """The address under which other machines reach a server that listens on `host`, also for wildcards."""
    if configured := os.environ.get(OWN_ADDRESS):
        return configured
    if is_loopback(host):
        return "127.0.0.1"
    if host not in ("0.0.0.0", "::", ""):
        return host
    from sglang.srt.utils.network import get_local_ip_auto

    return str(get_local_ip_auto())


def run(server_args: Any, registrar: Registrar | None) -> None:
    """Serve until SIGTERM or Ctrl-C. Registers after the warm-up; deregisters before SGLang drains."""
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.utils import kill_process_tree

    def leave(*_: Any) -> None:
        if registrar is not None:
            registrar.close()

    def crashed(*_: Any) -> None:
        if registrar is not None:
            registrar.crashed()

    def interrupt_as_sigterm(handle_exit: Any, http_server: Any, signum: int, frame: Any) -> None:
        """The first Ctrl-C drains as SIGTERM does; the second ends the server at once."""
        if signum == signal.SIGINT and not interrupted.is_set():
            interrupted.set()
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            handle_exit(http_server, signum, frame)

    interrupted = threading.Event()
    HookRegistry.register(seams.SIGTERM_HANDLER, leave, HookType.BEFORE)
    HookRegistry.register(seams.SIGQUIT_HANDLER, crashed, HookType.BEFORE)
    HookRegistry.register(seams.SIGINT_HANDLER, interrupt_as_sigterm, HookType.AROUND)
    admission.place()
    if is_cpu_machine():
        forking.fork_children()
    HookRegistry.apply_hooks()
    add_pool_endpoints()
    try:
        launch_server(server_args, launch_callback=registrar.start if registrar is not None else None)
    except KeyboardInterrupt:
        logger.info("interrupted")
    finally:
        leave()
        kill_process_tree(os.getpid(), include_parent=False)


def add_pool_endpoints() -> None:
    """Add the endpoints of the memory pools to SGLang's HTTP server. Call before it starts.

    GET /mempool            JSON, one entry per scheduler that answers (one per data-parallel rank)
    GET /mempool/metrics    the same numbers in Prometheus' text format
    """
    from fastapi import Response

    async def mempool() -> list[dict[str, Any]]:
        return await _pool_reports()

    async def metrics() -> Response:
        return Response(exposition(await _pool_reports()), media_type=CONTENT_TYPE)

    app = pkgutil.resolve_name(f"{seams.HTTP_SERVER}:app")
    app.add_api_route("/mempool", mempool, methods=["GET"])
    app.add_api_route("/mempool/metrics", metrics, methods=["GET"])


async def _pool_reports() -> list[dict[str, Any]]:
    """The schedulers' reports; empty for a server without a memory pool."""
    state = pkgutil.resolve_name(f"{seams.HTTP_SERVER}:get_global_state")()
    reports = await state.tokenizer_manager.get_internal_state()
    return [report["memserve"]["pool"] for report in reports if "pool" in report.get("memserve", {})]


def _quiet_import_warnings() -> None:
    """Hide the warnings about quantizations that need a GPU, which each SGLang process prints at import."""
    warnings.simplefilter("ignore", UserWarning)
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning")


def _check_model(argv: list[str]) -> None:
    """Raises ConfigError, in one line, for an invalid model path."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model-path", "--model")
    parser.add_argument("--config")
    known, _ = parser.parse_known_args(argv)
    if known.config is not None:
        return
    if known.model_path is None:
        raise ConfigError(
            "--model-path is missing: a directory with config.json, or a Hugging Face model name"
        )
    path = Path(known.model_path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"--model-path {path}: the directory holds no config.json")
    elif path.is_absolute() or len(path.parts) != 2 or Path(path.parts[0]).is_dir() or path.parts[0] == "..":
        raise ConfigError(f"--model-path {path}: no such directory")


class _OneLineParser(argparse.ArgumentParser):
    """Reports an error without the usage text of SGLang's 400 flags."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (`sglang serve --help` lists SGLang's flags)")


def _checked(argv: list[str], server_args_class: Any) -> list[str]:
    """`argv` with `--config FILE` expanded, so that the file overrides our flags.

    Raises ConfigError for a flag that SGLang does not accept.
    """
    parser = _OneLineParser()
    server_args_class.add_cli_args(parser)
    if "--config" in argv:
        from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger

        argv = ConfigArgumentMerger(parser).merge_config_with_args(argv)
    parser.parse_args(argv)
    return argv
