"""Builds a router from its configuration, runs it, and shuts it down."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from memserve.core.cluster_key import ClusterKey
from memserve.core.hosts import bracketed, is_loopback
from memserve.router.auth.tls import client_context
from memserve.router.cluster.control import ControlHandler
from memserve.router.cluster.discovery.kubernetes import Discovery, PodApi
from memserve.router.cluster.drain import DrainManager
from memserve.router.cluster.health import HealthProber
from memserve.router.cluster.instance import Instance
from memserve.router.cluster.pools import Pools
from memserve.router.cluster.registry import InstanceRegistry
from memserve.router.cluster.roles import RoleChanges
from memserve.router.config import RouterConfig
from memserve.router.http.cors import Cors
from memserve.router.http.endpoints import routes
from memserve.router.http.handlers.dashboard import Dashboard
from memserve.router.http.handlers.generate import GenerateHandler, PassthroughHandler
from memserve.router.http.handlers.info import InfoHandlers
from memserve.router.http.handlers.probes import ProbeHandlers
from memserve.router.http.handlers.workers import WorkersApi
from memserve.router.http.ingress import Ingress, build_ingress
from memserve.router.http.openapi import encoded_document
from memserve.router.http.request_chain import RequestChain
from memserve.router.http.routes import serve_http, serve_metrics, web_app
from memserve.router.kv_events.synchronizer import TreeSynchronizer
from memserve.router.observability.config import ObservabilityConfig
from memserve.router.observability.metrics import DURATIONS, RouterMetrics
from memserve.router.observability.state_metrics import StateCollector
from memserve.router.observability.tracing import PropagateOnly, Tracing
from memserve.router.proxy.config import ProxyConfig
from memserve.router.proxy.connection_pool import ConnectionPool
from memserve.router.proxy.dispatcher import Dispatcher
from memserve.router.proxy.executor import RequestExecutor
from memserve.router.proxy.fetcher import Fetcher
from memserve.router.proxy.passthrough import Passthrough
from memserve.router.proxy.prepare import RequestPreparer
from memserve.router.proxy.recovery import StreamRecovery
from memserve.router.proxy.retry import RetryLoop, RetryPolicy
from memserve.router.proxy.upstream import Upstream, open_session
from memserve.router.records import Traces
from memserve.router.state import RouterState, new_state
from memserve.wire.link import ControlServer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Router:
    """A running router."""

    url: str
    control_address: str
    cluster: InstanceRegistry
    state: RouterState
    ingress: Ingress

    @property
    def pools(self) -> Pools:
        return self.state.pools

    @property
    def synchronizer(self) -> TreeSynchronizer:
        return self.state.synchronizer


@dataclass(frozen=True, slots=True)
class _Proxy:
    """What sends requests to servers."""

    session: aiohttp.ClientSession
    connections: ConnectionPool
    fetcher: Fetcher
    dispatcher: Dispatcher


@asynccontextmanager
async def running_router(config: RouterConfig) -> AsyncIterator[Router]:
    """A router that serves inside the block, and ends its requests when the block is left.

    Raises ConfigError if an address is not available or a file cannot be used.
    """
    file = config.cluster.cluster_key_file
    key = ClusterKey.read(file) if file else None
    metrics = RouterMetrics(config.observability.prometheus_duration_buckets or DURATIONS)
    ingress = build_ingress(config.http, config.auth, config.tls, config.admission, metrics)
    state = new_state(config, metrics)
    metrics.watch(StateCollector(state))
    async with AsyncExitStack() as stack:
        stack.callback(state.tokenizers.close)
        stack.push_async_callback(state.subscriptions.close)
        proxy = await _open_proxy(stack, config, state, key)
        num_running, evacuate_s = state.scheduler.num_running, config.cluster.drain_evacuate_secs
        drains = DrainManager(state.cluster, state.pools, num_running, key=key, evacuate_s=evacuate_s)
        stack.callback(drains.close)
        port = await _serve_http(stack, config, state, metrics, ingress, proxy, drains)
        control = _serve_control(stack, config, state, port, key)
        prober = HealthProber(
            state.cluster, state.pools, state.tokenizers, proxy.session, config.health, time.monotonic
        )
        upkeep = [
            ingress.reload,
            lambda: proxy.fetcher.retain(state.pools),
            drains.retain,
            lambda: proxy.connections.retain(state.cluster.up),
        ]
        _start(stack, prober.run(), _run_upkeep(state, upkeep))
        if config.discovery is not None:
            _start(stack, Discovery(config.discovery, state.cluster, drains, PodApi(config.discovery)).run())
        url = f"{'https' if ingress.tls else 'http'}://{bracketed(config.http.host)}:{port}"
        yield Router(url, control.address, state.cluster, state, ingress)


async def _open_proxy(
    stack: AsyncExitStack, config: RouterConfig, state: RouterState, key: ClusterKey | None
) -> _Proxy:
    fetcher = Fetcher(key)
    stack.callback(fetcher.close)
    tls = client_context(
        config.tls.ssl_ca_certs, config.tls.ssl_client_certfile, config.tls.ssl_client_keyfile
    )
    session = await stack.enter_async_context(
        open_session(tls, config.proxy.upstream_keepalive_secs, config.auth.api_key)
    )
    connections = ConnectionPool(tls, config.proxy)
    stack.callback(connections.close)
    state.cluster.on_unresponsive = connections.abandon
    state.cluster.on_crashed = connections.crashed
    upstream = Upstream(
        connections, session, on_lost=_on_lost(state), abort_timeout_s=config.proxy.abort_timeout_secs
    )
    stack.push_async_callback(upstream.close)
    executor = RequestExecutor(upstream, state.scheduler, fetcher)
    recovery = StreamRecovery(state.tokenizers, is_on=config.proxy.resume == "auto")
    policy = _retry_policy(config.proxy)
    retries = RetryLoop(state.cluster, state.scheduler, state.breakers, policy, state.telemetry)
    dispatcher = Dispatcher(retries, executor, recovery, state.telemetry, upstream)
    return _Proxy(session, connections, fetcher, dispatcher)


async def _serve_http(
    stack: AsyncExitStack,
    config: RouterConfig,
    state: RouterState,
    metrics: RouterMetrics,
    ingress: Ingress,
    proxy: _Proxy,
    drains: DrainManager,
) -> int:
    """Start HTTP; its port."""
    cors = Cors(config.http.cors_allowed_origins)
    traces = _traces(stack, config.observability)
    record, id_headers = state.telemetry.requests.add, config.http.request_id_headers
    chain = RequestChain(ingress, record, traces, id_headers, cors.reply if cors else None)
    preparer = RequestPreparer(state.cluster, state.reader, state.telemetry.prefixes.sample)
    passthrough = Passthrough(
        proxy.connections,
        preparer.candidates,
        state.breakers,
        state.scheduler.num_running,
        _on_lost(state),
        timeout_s=config.proxy.request_timeout_secs,
    )
    roles = RoleChanges(state.cluster, drains)
    stack.callback(roles.close)
    info = InfoHandlers(
        state, metrics.exposition, proxy.session, ingress.access, encoded_document, proxy.dispatcher.abort
    )
    generate = GenerateHandler(chain, preparer, proxy.dispatcher)
    handlers = (
        generate,
        PassthroughHandler(chain, passthrough),
        WorkersApi(state, drains, roles),
        info,
        ProbeHandlers(state, proxy.session),
        Dashboard(state, config.routing.policies, ingress.admission),
    )
    app = web_app(cors, ingress, routes(*handlers))
    port = await serve_http(stack, config.http, generate, app, ingress, cors)
    metrics_port = config.observability.metrics_port
    if metrics_port is not None:
        await serve_metrics(
            stack, config.observability.prometheus_host or config.http.host, metrics_port, info
        )
    stack.push_async_callback(chain.stop, config.http.shutdown_grace_period_secs)
    return port


async def serve(config: RouterConfig) -> None:
    """Run a router until SIGINT or SIGTERM. Raises ConfigError if it cannot start."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    async with running_router(config) as router:
        loop.add_signal_handler(signal.SIGHUP, lambda: router.ingress.reload(is_forced=True))
        logger.info("router ready http=%s control=%s", router.url, router.control_address)
        hint = (
            "python -m memserve.launch_server --role prefill|decode|colocated --router %s --model-path MODEL"
        )
        logger.info("add servers with: " + hint, router.control_address)
        await stopped.wait()
        logger.info("router stopping")
    logger.info("router stopped")


def _on_lost(state: RouterState) -> Callable[[Instance, str], None]:
    """The reaction to an instance whose connection failed."""

    def on_lost(instance: Instance, reason: str) -> None:
        if instance in state.cluster.snapshot.all():  # one fault, whatever number of requests it had
            state.breakers.failed(instance)
        state.cluster.lost_contact(instance.instance_id, instance.epoch, reason)

    return on_lost


def _serve_control(
    stack: AsyncExitStack, config: RouterConfig, state: RouterState, http_port: int, key: ClusterKey | None
) -> ControlServer:
    """Start the control plane, where instances and pools register."""
    handler = ControlHandler(
        state.cluster,
        state.pools,
        state.synchronizer,
        asyncio.get_running_loop(),
        lambda named: state.reader.text_keys.record_keys(named.rid, named.keys),
    )
    port = config.cluster.control_port
    if port is None:
        port = http_port + 1 if config.http.port else 0
    control = ControlServer(_control_host(config), port, handler, key=key)
    stack.push_async_callback(asyncio.to_thread, control.close)
    return control


def _control_host(config: RouterConfig) -> str:
    """The control plane's address: without a key, loopback if other servers are named or discovered."""
    host, has_others = config.http.host, bool(config.cluster.static or config.discovery)
    if has_others and config.cluster.cluster_key_file is None and not is_loopback(host):
        logger.info("without --cluster-key-file, only instances on this machine can register")
        return "127.0.0.1"
    return host


def _traces(stack: AsyncExitStack, config: ObservabilityConfig) -> Traces:
    """Raises ConfigError if spans are enabled and their packages are missing."""
    if not config.enable_trace:
        return PropagateOnly()
    tracing = Tracing.to(config.otlp_traces_endpoint)
    stack.push_async_callback(asyncio.to_thread, tracing.close)
    return tracing


def _retry_policy(config: ProxyConfig) -> RetryPolicy:
    return RetryPolicy(
        timeout_s=config.request_timeout_secs,
        max_retries=config.retry_max_retries,
        initial_backoff_s=config.retry_initial_backoff_ms / 1000,
        max_backoff_s=config.retry_max_backoff_ms / 1000,
        poison_threshold=config.poison_threshold,
    )


def _start(stack: AsyncExitStack, *works: Coroutine[Any, Any, None]) -> None:
    """Run these in tasks that the stack cancels; one that fails ends the process."""
    for work in works:
        task = asyncio.create_task(work)
        task.add_done_callback(_end_if_failed)
        stack.callback(task.cancel)


async def _run_upkeep(state: RouterState, others: Sequence[Callable[[], None]]) -> None:
    """Drop the records of instances that have left, and compact the tree, until cancelled."""
    while True:
        state.subscriptions.update(state.cluster.up, state.pools)
        state.breakers.retain((it.info.instance_id, it.info.epoch) for it in state.cluster.members())
        state.scheduler.retain(state.cluster.working())
        for other in others:
            other()
        state.synchronizer.synced_tree().tidy()
        state.telemetry.tick(time.monotonic())
        await asyncio.sleep(0.25)


def _end_if_failed(task: asyncio.Task[None]) -> None:
    """End the process: a router that no longer sees instances come and go must be restarted."""
    if not task.cancelled() and task.exception() is not None:
        logger.critical("a part of the router failed; it cannot go on", exc_info=task.exception())
        os.kill(os.getpid(), signal.SIGTERM)
