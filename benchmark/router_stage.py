"""Routers as processes, in front of workers that cost nothing: nginx answers, wrk asks.

    wrk ──> router (ours, or a peer's wheel) ──> 4 x nginx, which answers as SGLang would

Needs `apt install nginx-light wrk`. Knows the flags of each router, not the measurement.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from memserve.testing.ending import start_child

START_TIMEOUT_S = 60.0
MODEL = "bench"
PAD = "lorem ipsum dolor sit amet, "

_META = {"finish_reason": {"type": "length", "length": 16}, "prompt_tokens": 1024, "completion_tokens": 16}
_ANSWER = {"text": "x" * 64, "output_ids": [1] * 16, "meta_info": {"id": "x", "cached_tokens": 0, **_META}}
_CHOICE = {"index": 0, "delta": {"content": "x" * 16}, "finish_reason": None}
_EVENT = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": MODEL, "choices": [_CHOICE]}
_EVENTS = f"data: {json.dumps(_EVENT)}\n\n" * 4 + "data: [DONE]\n\n"


@dataclass(frozen=True)
class Setting:
    """The kind of load."""

    pd: bool
    stream: bool
    prompt_bytes: int

    def __str__(self) -> str:
        kind = "pair" if self.pd else "single"
        return f"{kind}_{'stream' if self.stream else 'plain'}_{self.prompt_bytes // 1024}k"


@dataclass(frozen=True)
class Load:
    """The result of one wrk run."""

    requests: int
    requests_per_s: float
    p50_us: float
    num_wrong: int


def require_tools() -> None:
    """Raises SystemExit with what to install."""
    missing = [name for name in ("nginx", "wrk") if shutil.which(name) is None]
    if missing:
        raise SystemExit(f"{' and '.join(missing)} not found: apt install nginx-light wrk")


def free_port() -> int:
    """A free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Worker:
    """One nginx that answers as an SGLang server of `mode` does. May be killed and started."""

    def __init__(self, mode: str, folder: Path, *, counts: bool) -> None:
        """`mode`: null, prefill or decode. `counts`: note each request, to be counted."""
        self.port = free_port()
        self.mode = mode
        self._log = folder / f"{self.port}.log"
        self._config = folder / f"{self.port}.conf"
        self._config.write_text(self._configuration(folder, counts))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = ["nginx", "-c", str(self._config), "-p", str(self._config.parent)]
        self._process = start_child(command, stderr=subprocess.DEVNULL)
        wait_for(f"{self.url}/health")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def num_served(self) -> int:
        """Requests for generation, so far."""
        return self._log.read_bytes().count(b"\n") if self._log.exists() else 0

    def _configuration(self, folder: Path, counts: bool) -> str:
        server = {
            "disaggregation_mode": self.mode,
            "disable_radix_cache": False,
            "page_size": 64,
            "max_total_num_tokens": 1 << 22,
            "dp_size": 1,
            "status": "ready",
            "version": "0.5.23",
            "internal_states": [{}],
        }
        model = {"model_path": f"/nowhere/{MODEL}", "served_model_name": MODEL, "is_generation": True}
        card = {"id": MODEL, "object": "model", "max_model_len": 131072}
        pages: dict[str, object] = {
            "/model_info": model,
            "/get_model_info": model,
            "/server_info": server,
            "/get_server_info": server,
            "/v1/models": {"object": "list", "data": [card]},
            "/v1/tokenize": {"count": 1, "tokens": [1]},
            "/": {},
        }
        note = f"access_log {self._log};" if counts else ""
        places = [f"location = /generate {{ {note} return 200 '{json.dumps(_ANSWER)}'; }}"]
        streams = self.mode != "prefill"  # a prefill server is always asked for a whole answer
        kind, answer = (
            ("text/event-stream", _EVENTS) if streams else ("application/json", json.dumps(_ANSWER))
        )
        places.append(
            f"location = /v1/chat/completions {{ default_type {kind}; {note} return 200 '{answer}'; }}"
        )
        for path, page in pages.items():
            places.append(
                f"location {'' if path == '/' else '= '}{path} {{ return 200 '{json.dumps(page)}'; }}"
            )
        return (
            f"daemon off; master_process off; pid {folder}/{self.port}.pid; error_log /dev/null;\n"
            "events { worker_connections 4096; }\n"
            "http { access_log off; default_type application/json; keepalive_requests 100000000;\n"
            "client_max_body_size 100m; client_body_buffer_size 128k;\n"
            f"server {{ listen 127.0.0.1:{self.port} reuseport; {' '.join(places)} }} }}\n"
        )


@dataclass(frozen=True)
class Named:
    """A server that does both, wherever it comes from."""

    url: str
    mode: str = "null"


class Router:
    """A router's process. Made by `running`."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], port: int) -> None:
        self.name = name
        self.port = port
        self.process = process

    def cpu_s(self) -> float:
        """Processor time of all its threads, so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rss_mib(self) -> float:
        """Memory that it has now."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextmanager
def workers(pd: bool, *, counts: bool = False) -> Iterator[list[Worker]]:
    """Four workers: two prefills and two decodes, or four that do both."""
    with tempfile.TemporaryDirectory() as folder:
        modes = ["prefill", "prefill", "decode", "decode"] if pd else ["null"] * 4
        made = [Worker(mode, Path(folder), counts=counts) for mode in modes]
        try:
            for worker in made:
                worker.start()
            yield made
        finally:
            for worker in made:
                worker.kill()


@contextmanager
def running(name: str, peers: Path, behind: Sequence[Worker | Named]) -> Iterator[Router]:
    """The router `name`, ready to serve. Raises TimeoutError if it is not in time."""
    port = free_port()
    with tempfile.TemporaryFile() as log:
        process = start_child(_command(name, peers, behind, port), stdout=log, stderr=log)
        try:
            wait_for(f"http://127.0.0.1:{port}/readiness", process)
            yield Router(name, process, port)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def load(port: int, setting: Setting, connections: int, seconds: int, seed: int) -> Load:
    """Ask for `seconds`, each time with another prompt. Another `seed`: other prompts."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(_script(setting, seed))
        script.flush()
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "30s", "--latency"]
        command += ["-s", script.name, f"http://127.0.0.1:{port}"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counted = re.search(r"(\d+) requests in", said)
    rate = re.search(r"Requests/sec:\s+([\d.]+)", said)
    median = re.search(r"50%\s+([\d.]+)(us|ms|s)", said)
    if counted is None or rate is None or median is None:
        raise RuntimeError(f"wrk said: {said}")
    wrong = re.search(r"Non-2xx or 3xx responses: (\d+)", said)
    broken = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", said)
    num_wrong = int(wrong[1]) if wrong else 0
    num_wrong += sum(map(int, broken.groups())) if broken else 0
    unit = {"us": 1.0, "ms": 1e3, "s": 1e6}[median[2]]
    return Load(int(counted[1]), float(rate[1]), float(median[1]) * unit, num_wrong)


def wait_for(url: str, process: subprocess.Popen[bytes] | None = None) -> None:
    """Until `url` answers 200."""
    pause, deadline = threading.Event(), time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process is not None and process.poll() is not None:
            raise RuntimeError(f"{process.args!r} ended with {process.returncode}")
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except OSError:
            pause.wait(0.05)
        else:
            return
    raise TimeoutError(f"{url} did not answer")


def _command(name: str, peers: Path, behind: Sequence[Worker | Named], port: int) -> list[str]:
    roles = {"prefill": "--prefill", "decode": "--decode"}
    pd = any(worker.mode in roles for worker in behind)
    named = ["--worker-urls", *(worker.url for worker in behind)]
    if pd:
        named = []
        for worker in behind:
            named += [roles[worker.mode], worker.url, *(["8998"] if worker.mode == "prefill" else [])]
    if name == "memserve":
        ours = [sys.executable, "-m", "memserve.launch_router", "--port", str(port), "--control-port", "0"]
        return [*ours, *named]
    command = [str(peers / "bin" / name)]
    if name != "vllm-router":
        command.append("launch")
    if pd:
        command.append("--pd-disaggregation" if name != "vllm-router" else "--vllm-pd-disaggregation")
    metrics = ["--prometheus-port", str(free_port())]
    level = "warning" if name == "vllm-router" else "warn"
    policy = ["--policy", "cache_aware", "--log-level", level]
    return [*command, "--host", "127.0.0.1", "--port", str(port), *policy, *metrics, *named]


def _script(setting: Setting, seed: int) -> str:
    """For wrk: a new prompt each time, of which only the first 16 bytes are new."""
    if setting.stream:
        path = "/v1/chat/completions"
        before = f'{{"model":"{MODEL}","stream":true,"messages":[{{"role":"user","content":"'
        after = '"}],"max_tokens":16}'
    else:
        path, before = "/generate", '{"text":"'
        after = '","sampling_params":{"max_new_tokens":16},"stream":false}'
    pad = PAD * (setting.prompt_bytes // len(PAD))
    return (
        f"local n = {seed * 10_000_000}\n"
        'local headers = {["Content-Type"] = "application/json"}\n'
        "request = function()\n"
        "  n = n + 1\n"
        f"  return wrk.format('POST', '{path}', headers, '{before}' .. string.format('%016x', n)"
        f" .. '{pad}{after}')\nend\n"
    )
