"""What a user would run instead: `sglang.launch_server` pairs behind `sglang-router`, none of ours joined in.

On a machine without a GPU our platform and attention backend stand in for CUDA's, as for any server there;
KV goes from prefill to decode over SGLang's own Mooncake connector (`memserve.launch_server` hooks neither).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import requests

from memserve.core.hosts import keep_port
from memserve.engine.server_flags import cpu_flags
from memserve.testing.cluster import ServerProcess, wait_for
from memserve.wire.messages import Role
from systems.base import Setting, System, pin

TIMEOUT_S = 60
PATIENCE_S = 180


@dataclass(frozen=True, slots=True)
class StockFlags:
    """Additional flags of each role."""

    prefill: tuple[str, ...] = ()
    decode: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()


class StockPair(System):
    """One prefill and one decode server behind sglang-router with its cache_aware policy."""

    def __init__(self, name: str, setting: Setting, extra: StockFlags) -> None:
        """Raises SystemExit if sglang-router is not installed."""
        super().__init__(name)
        if importlib.util.find_spec("sglang_router") is None:
            raise SystemExit("sglang-router is not installed: pip install 'memserve[bench]'")
        self._setting, self._extra = setting, extra
        ports = [keep_port() for _ in range(5)]
        prefill, decode, bootstrap, router, prometheus = ports
        self._bootstrap = bootstrap
        self._servers = {
            "prefill": self._launch(Role.PREFILL, prefill, 0),
            "decode": self._launch(Role.DECODE, decode, 1),
        }
        self._urls = [f"http://127.0.0.1:{port}" for port in (prefill, decode)]
        self._router_ports = router, prometheus
        self._router: ServerProcess | None = None

    def _launch(self, role: Role, port: int, share: int) -> ServerProcess:
        """One server, with SGLang's own flags and the flags of a machine without a GPU."""
        flags = ["--model-path", str(self._setting.model), "--host", "127.0.0.1", "--port", str(port)]
        flags += [*cpu_flags(role), *self._setting.flags, "--enable-cache-report"]
        flags += ["--disaggregation-mode", role.value, "--disaggregation-transfer-backend", "mooncake_tcp"]
        if role is Role.PREFILL:
            flags += ["--disaggregation-bootstrap-port", str(self._bootstrap), *self._extra.prefill]
        else:
            flags += self._extra.decode
        env = {"OMP_NUM_THREADS": "1", **dict(self._extra.env)}
        log = self._setting.logs / self.name / f"{role}.log"
        process = ServerProcess(f"{self.name}'s {role}", ["sglang.launch_server", *flags], log, env)
        pin(process, share, 2)
        return process

    def wait_ready(self) -> None:
        for process, url in zip(self._servers.values(), self._urls, strict=True):
            wait_for(partial(_answers, f"{url}/health"), [process], what=process.name, timeout_s=PATIENCE_S)
        port, prometheus = self._router_ports
        prefill, decode = self._urls
        flags = ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(prometheus)]
        flags += ["--pd-disaggregation", "--prefill", prefill, str(self._bootstrap), "--decode", decode]
        flags += ["--policy", "cache_aware", "--disable-retries", "--log-level", "warn"]
        log = self._setting.logs / self.name / "router.log"
        self._router = ServerProcess(f"{self.name}'s router", ["sglang_router.launch_router", *flags], log)
        url = f"http://127.0.0.1:{port}"
        ready = partial(_answers, f"{url}/readiness")
        wait_for(ready, [self._router], what=self._router.name, timeout_s=PATIENCE_S)
        self.url = url

    def flush(self) -> None:
        for url in self._urls:
            wait_for(partial(_flushed, url), what=f"{url} to flush", timeout_s=TIMEOUT_S)

    def settle(self) -> None:
        """None: a stock server does not report it."""

    def processes(self) -> Mapping[str, ServerProcess]:
        router = {} if self._router is None else {"router": self._router}
        return {**router, **self._servers}


def _answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=5).status_code == 200
    except requests.RequestException:
        return False


def _flushed(url: str) -> bool:
    """A server with requests in flight refuses."""
    return requests.post(f"{url}/flush_cache", timeout=TIMEOUT_S).status_code == 200
