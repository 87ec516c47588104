"""Builds a router from its configuration, runs it, and takes it down again."""

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
from memserve.router.http.endpoints import routes
from memserve.router.http.handlers.dashboard import Dashboard
from memserve.router.http.handlers.generate import GenerateHandler
from memserve.router.http.handlers.info import InfoHandlers
from memserve.router.http.handlers.passthrough import PassthroughHandler
from memserve.router.http.handlers.workers import WorkersApi
from memserve.router.http.ingress import Ingress, build_ingress
from memserve.router.http.middleware import Cors
from memserve.router.http.openapi import document
from memserve.router.http.request_chain import RequestChain
from memserve.router.http.routes import serve_http, serve_metrics, web_app
from memserve.router.kv_events.synchronizer import TreeSynchronizer
from memserve.router.observability.metrics import DURATIONS, RouterMetrics
from memserve.router.observability.state_metrics import StateCollector
from memserve.router.observability.tracing import PropagateOnly, Tracing
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
from memserve.router.request import encode_json
from memserve.router.state import RouterState, new_state
from memserve.wire.link import ControlServer

logger = logging.getLogger(__name__)

TIDY_S = 0.25
"""How often what has changed meanwhile is followed up, and a little of the tree's memory given back."""


@dataclass(frozen=True, slots=True)
class Router:
    """A router that is running."""

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


@asynccontextmanager
async def running_router(config: RouterConfig) -> AsyncIterator[Router]:
    """A router that serves inside the block, and ends its requests when the block is left.

    Raises ConfigError if an address cannot be had.
    """
    key = ClusterKey.read(config.cluster_key_file) if config.cluster_key_file else None
    metrics = RouterMetrics(config.observe.prometheus_duration_buckets or DURATIONS)
    ingress = build_ingress(config, metrics)
    state = new_state(config, metrics)
    metrics.watch(StateCollector(state))
    cluster, pools = state.cluster, state.pools
    async with AsyncExitStack() as stack:
        stack.callback(state.tokenizers.close)
        stack.push_async_callback(state.subscriptions.close)
        fetcher = Fetcher(key)
        stack.callback(fetcher.close)
        tls = client_context(config.ssl_ca_certs, config.ssl_client_certfile, config.ssl_client_keyfile)
        session = await stack.enter_async_context(open_session(tls, config.api_key))
        connections = ConnectionPool(tls)
        stack.callback(connections.close)
        cluster.on_unresponsive = connections.give_up
        upstream = Upstream(connections, session, on_lost=_on_lost(state))
        stack.push_async_callback(upstream.close)
        executor = RequestExecutor(upstream, state.selector, fetcher)
        recovery = StreamRecovery(state.tokenizers, is_on=config.resume == "auto")
        policy, telemetry = _retry_policy(config), state.telemetry
        retries = RetryLoop(cluster, state.selector, state.breakers, policy, telemetry)
        dispatcher = Dispatcher(retries, executor, recovery, telemetry)
        traces = _traces(stack, config)
        preparer = RequestPreparer(cluster, state.reader, state.telemetry.prefixes.sample)
        cors = Cors(config.observe.cors_allowed_origins)
        record, id_headers = state.telemetry.requests.add, config.observe.request_id_headers
        chain = RequestChain(ingress, record, traces, id_headers, cors.reply if cors else None)
        generate = GenerateHandler(chain, preparer, dispatcher)
        passthrough = Passthrough(
            connections,
            preparer.candidates,
            state.breakers,
            state.selector.num_running,
            _on_lost(state),
            timeout_s=config.request_timeout_secs,
        )
        drains = DrainManager(
            cluster, pools, state.selector.num_running, key=key, evacuate_s=config.drain_evacuate_secs
        )
        stack.callback(drains.close)
        roles = RoleChanges(cluster, drains)
        stack.callback(roles.close)
        pages = InfoHandlers(state, metrics.exposition, session, ingress.access, encode_json(document()))
        dashboard = Dashboard(state, config, ingress.admission)
        handlers = (
            generate,
            PassthroughHandler(chain, passthrough),
            WorkersApi(state, drains, roles),
            pages,
            dashboard,
        )
        app = web_app(cors, ingress, routes(*handlers))
        port = await serve_http(stack, config, generate, app, ingress)
        await serve_metrics(stack, config, pages)
        control = _listening(stack, config, state, port, key)
        stack.push_async_callback(chain.stop, config.shutdown_grace_period_secs)
        keepers = [
            ingress.follow,
            lambda: fetcher.keep(pools),
            drains.retain,
            lambda: connections.keep(cluster.up),
        ]
        interval_s = config.health_check_interval_secs
        prober = HealthProber(
            cluster, pools, state.tokenizers, session, interval_s=interval_s, clock=time.monotonic
        )
        _begin(stack, prober.run(), _keep_up(state, keepers))
        if config.discovery is not None:
            _begin(stack, Discovery(config.discovery, cluster, drains, PodApi(config.discovery)).run())
        url = f"{'https' if ingress.tls else 'http'}://{bracketed(config.host)}:{port}"
        yield Router(url, control.address, cluster, state, ingress)


async def serve(config: RouterConfig) -> None:
    """Run a router until SIGINT or SIGTERM. Raises ConfigError if it cannot start."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    async with running_router(config) as router:
        loop.add_signal_handler(signal.SIGHUP, lambda: router.ingress.follow(is_asked=True))
        logger.info("router ready http=%s control=%s", router.url, router.control_address)
        hint = (
            "python -m memserve.launch_server --role prefill|decode|colocated --router %s --model-path MODEL"
        )
        logger.info("add servers with: " + hint, router.control_address)
        await stopped.wait()
        logger.info("router stopping")
    logger.info("router stopped")


def _on_lost(state: RouterState) -> Callable[[Instance, str], None]:
    """What is done about an instance whose connection failed."""

    def on_lost(instance: Instance, reason: str) -> None:
        if instance in state.cluster.snapshot.all():  # one fault, however many requests it had
            state.breakers.failed(instance)
        state.cluster.lost_contact(instance.instance_id, instance.epoch, reason)

    return on_lost


def _listening(
    stack: AsyncExitStack, config: RouterConfig, state: RouterState, http_port: int, key: ClusterKey | None
) -> ControlServer:
    """The control plane, which instances and pools come to."""
    handler = ControlHandler(
        state.cluster,
        state.pools,
        state.synchronizer,
        asyncio.get_running_loop(),
        lambda named: state.reader.memory.named(named.rid, named.keys),
    )
    control = ControlServer(_control_host(config), _control_port(config, http_port), handler, key=key)
    stack.push_async_callback(asyncio.to_thread, control.close)
    return control


def _begin(stack: AsyncExitStack, *works: Coroutine[Any, Any, None]) -> None:
    """Run these beside everything else, until the router ends."""
    for work in works:
        task = asyncio.create_task(work)
        task.add_done_callback(_end_if_failed)
        stack.callback(task.cancel)


def _traces(stack: AsyncExitStack, config: RouterConfig) -> Traces:
    """What is done with traces. Raises ConfigError if spans are wanted and cannot be made."""
    if not config.observe.enable_trace:
        return PropagateOnly()
    tracing = Tracing.to(config.observe.otlp_traces_endpoint)
    stack.push_async_callback(asyncio.to_thread, tracing.close)
    return tracing


def _retry_policy(config: RouterConfig) -> RetryPolicy:
    return RetryPolicy(
        timeout_s=config.request_timeout_secs,
        max_retries=config.retry_max_retries,
        initial_backoff_s=config.retry_initial_backoff_ms / 1000,
        max_backoff_s=config.retry_max_backoff_ms / 1000,
    )


async def _keep_up(state: RouterState, keepers: Sequence[Callable[[], None]]) -> None:
    """Follow who has come and gone, and give memory back, until cancelled."""
    while True:
        state.subscriptions.follow(state.cluster.up, state.pools)
        state.breakers.retain((it.info.instance_id, it.info.epoch) for it in state.cluster.members())
        state.selector.keep(state.cluster.working())
        for keep in keepers:
            keep()
        state.synchronizer.tree.tidy()
        state.telemetry.tick(time.monotonic())
        await asyncio.sleep(TIDY_S)


def _end_if_failed(task: asyncio.Task[None]) -> None:
    """A router that notices nobody's coming and going any more is worse than one that is started again."""
    if not task.cancelled() and task.exception() is not None:
        logger.critical("a part of the router failed; it cannot go on", exc_info=task.exception())
        os.kill(os.getpid(), signal.SIGTERM)


def _control_host(config: RouterConfig) -> str:
    """Where instances register: where servers are named and there is no key, on this machine only."""
    is_enough = config.static or config.discovery
    if is_enough and config.cluster_key_file is None and not is_loopback(config.host):
        logger.info("without --cluster-key-file, instances of this machine alone can register")
        return "127.0.0.1"
    return config.host


def _control_port(config: RouterConfig, http_port: int) -> int:
    if config.control_port is not None:
        return config.control_port
    return http_port + 1 if config.port else 0
