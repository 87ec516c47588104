"""Builds a router from its configuration, runs it, and takes it down again."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from aiohttp import web

from memserve.core.cluster_key import ClusterKey
from memserve.core.errors import ConfigError
from memserve.core.hosts import bracketed, is_loopback
from memserve.router.cluster.breaker import Breakers
from memserve.router.cluster.cluster import Cluster
from memserve.router.cluster.control import ControlHandler
from memserve.router.cluster.draining import Drains
from memserve.router.cluster.instance import Instance
from memserve.router.cluster.kubernetes import Discovery, PodApi
from memserve.router.cluster.pools import Pools
from memserve.router.cluster.probe import Prober
from memserve.router.cluster.roles import Roles
from memserve.router.config import RouterConfig
from memserve.router.costs.cost_file import COSTS, read_costs
from memserve.router.gate.door import Door, open_door
from memserve.router.gate.tls import client_context
from memserve.router.http import openapi
from memserve.router.http.cors import Cors
from memserve.router.http.front import Front
from memserve.router.http.generate import GenerateHandler, json_response
from memserve.router.http.guard import PAGE_BODY_BYTES, Guard, is_clients
from memserve.router.http.pages import Pages
from memserve.router.http.ui import Ui
from memserve.router.http.web_log import web_logger
from memserve.router.http.workers_api import WorkersApi
from memserve.router.observe.metrics import DURATIONS, RouterMetrics
from memserve.router.observe.observed import Observed
from memserve.router.observe.state_metrics import StateCollector
from memserve.router.observe.tracing import PassOn, Traces, Tracing
from memserve.router.placing.fetching import Fetcher
from memserve.router.placing.placement import Placer, PlacerSettings
from memserve.router.serving.attempt import Runner
from memserve.router.serving.connections import Connections
from memserve.router.serving.dispatch import Dispatcher
from memserve.router.serving.failures import failure
from memserve.router.serving.resuming import Resumer
from memserve.router.serving.retry import Patience
from memserve.router.serving.upstream import Upstream, open_session
from memserve.router.state import RouterState
from memserve.router.text.prompts import PromptReader
from memserve.router.text.tokenizers import Tokenizers
from memserve.router.tree.feed import TreeFeed
from memserve.router.tree.followers import MAX_NAMED_KEYS, Followers
from memserve.router.tree.prompt_tree import BYTES_PER_BLOCK, ClusterTree
from memserve.wire.link import ControlServer

logger = logging.getLogger(__name__)

TIDY_S = 0.25
"""How often what has changed meanwhile is followed up, and a little of the tree's memory given back."""


@dataclass(frozen=True, slots=True)
class Router:
    """A router that is running."""

    url: str
    control_address: str
    cluster: Cluster
    state: RouterState
    door: Door

    @property
    def pools(self) -> Pools:
        return self.state.pools

    @property
    def feed(self) -> TreeFeed:
        return self.state.feed


@asynccontextmanager
async def running_router(config: RouterConfig) -> AsyncIterator[Router]:
    """A router that serves inside the block, and ends its requests when the block is left.

    Raises ConfigError if an address cannot be had.
    """
    key = ClusterKey.read(config.cluster_key_file) if config.cluster_key_file else None
    metrics = RouterMetrics(config.observe.prometheus_duration_buckets or DURATIONS)
    door = open_door(config, metrics)
    state = _new_state(config, metrics)
    metrics.watch(StateCollector(state))
    cluster, pools, feed = state.cluster, state.pools, state.feed

    def on_lost(instance: Instance, reason: str) -> None:
        if instance in cluster.snapshot.all():  # one fault, however many requests it had
            state.breakers.failed(instance)
        cluster.lost_contact(instance.instance_id, instance.epoch, reason)

    async with AsyncExitStack() as stack:
        tls = client_context(config.ssl_ca_certs, config.ssl_client_certfile, config.ssl_client_keyfile)
        session = await stack.enter_async_context(open_session(tls, config.api_key))
        connections = Connections(tls)
        stack.callback(connections.close)
        cluster.on_silent = connections.give_up
        upstream = Upstream(connections, session, on_lost=on_lost)
        stack.push_async_callback(upstream.close)
        stack.callback(state.tokenizers.close)
        stack.push_async_callback(state.followers.close)
        fetcher = Fetcher(key)
        stack.callback(fetcher.close)
        resumer = Resumer(state.tokenizers, metrics, is_on=config.resume == "auto")
        runner = Runner(upstream, state.placer, fetcher)
        dispatcher = Dispatcher(state, runner, resumer, _patience(config), metrics)
        traces = _traces(stack, config)
        generate = GenerateHandler(dispatcher, state.observed.requests, door, config.observe, traces)
        prober = Prober(
            cluster,
            pools,
            state.tokenizers,
            session,
            interval_s=config.health_check_interval_secs,
            clock=time.monotonic,
        )
        pages = Pages(state, metrics, session, door.access)
        drains = Drains(
            cluster, pools, state.placer.num_running, key=key, evacuate_s=config.drain_evacuate_secs
        )
        stack.callback(drains.close)
        watching = []
        if config.discovery is not None:
            watching.append(Discovery(config.discovery, cluster, drains, PodApi(config.discovery)).run())
        roles = Roles(cluster, drains)
        stack.callback(roles.close)
        workers = WorkersApi(state, drains, roles)
        middlewares = [_answer_errors, Guard(door).middleware()]
        if cors := Cors(config.observe.cors_allowed_origins):
            middlewares.insert(0, cors.middleware(is_clients))
        app = web.Application(client_max_size=PAGE_BODY_BYTES, middlewares=middlewares)
        app.add_routes(
            [*generate.routes(), *workers.routes(), *pages.routes(), *Ui(state, config, door.gate).routes()]
        )
        app.router.add_get("/openapi.json", openapi.page)
        port = await _serve_http(stack, config, generate, app, door)
        await _serve_metrics(stack, config, pages)
        handler = ControlHandler(
            cluster,
            pools,
            feed,
            asyncio.get_running_loop(),
            lambda named: state.reader.memory.named(named.rid, named.keys),
        )
        control = ControlServer(_control_host(config), _control_port(config, port), handler, key=key)
        stack.push_async_callback(asyncio.to_thread, control.close)
        stack.push_async_callback(generate.stop, config.shutdown_grace_period_secs)
        keepers = [
            door.follow,
            lambda: fetcher.keep(pools),
            drains.keep,
            lambda: connections.keep(cluster.up),
        ]
        for work in (prober.run(), _keep_up(state, keepers), *watching):
            task = asyncio.create_task(work)
            task.add_done_callback(_end_if_failed)
            stack.callback(task.cancel)
        scheme = "https" if door.tls else "http"
        url = f"{scheme}://{bracketed(config.host)}:{port}"
        yield Router(url, control.address, cluster, state, door)


async def serve(config: RouterConfig) -> None:
    """Run a router until SIGINT or SIGTERM. Raises ConfigError if it cannot start."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    async with running_router(config) as router:
        loop.add_signal_handler(signal.SIGHUP, lambda: router.door.follow(is_asked=True))
        logger.info("router ready http=%s control=%s", router.url, router.control_address)
        hint = (
            "python -m memserve.launch_server --role prefill|decode|colocated --router %s --model-path MODEL"
        )
        logger.info("add servers with: " + hint, router.control_address)
        await stopped.wait()
        logger.info("router stopping")
    logger.info("router stopped")


def _new_state(config: RouterConfig, metrics: RouterMetrics) -> RouterState:
    """What a router knows when it starts: nothing. Raises ConfigError for costs that cannot be read."""
    clock = time.monotonic
    policy = config.policy
    prefill_policy, decode_policy = config.prefill_policy or policy, config.decode_policy or policy
    directs_fetches = config.fetch == "auto" and prefill_policy == "prompt_tree"
    cluster = Cluster(
        config.static, heartbeat_s=config.heartbeat_secs, clock=clock, stuck_s=config.stuck_secs
    )
    pools = Pools(
        heartbeat_s=config.heartbeat_secs,
        clock=clock,
        directs_fetches=directs_fetches,
        wants_names=config.routing_keys == "text",
    )
    max_blocks = (config.tree_budget_mib << 20) // BYTES_PER_BLOCK
    tree = ClusterTree(max_blocks=max_blocks, clock=clock)
    feed = TreeFeed(tree, pools, audit_s=config.tree_audit_secs, clock=clock)
    followers = Followers(
        lambda: feed.tree,
        lambda one: one.facts.following,
        max_named_keys=max(MAX_NAMED_KEYS, max_blocks // 4),
        mirror_ttl_s=config.learnt_ttl_secs,
    )
    settings = PlacerSettings(
        prefill_policy,
        decode_policy,
        start_costs=read_costs(config.costs),
        certainty=0.0 if config.costs in COSTS else 0.5,
        fetches=directs_fetches,
    )
    placer = Placer(settings, feed, pools, followers, metrics, clock)
    breakers = Breakers(threshold=config.cb_failure_threshold, timeout_s=config.cb_timeout_secs, clock=clock)
    tokenizers = Tokenizers(config.tokenizer_path)
    reader = PromptReader(tokenizers, config.routing_keys)
    observed = Observed.new(metrics, clock(), keeps_samples=config.observe.ui_show_prompts)
    return RouterState(cluster, pools, feed, followers, tokenizers, placer, breakers, reader, observed)


def _traces(stack: AsyncExitStack, config: RouterConfig) -> Traces:
    """What is done with traces. Raises ConfigError if spans are wanted and cannot be made."""
    if not config.observe.enable_trace:
        return PassOn()
    tracing = Tracing.to(config.observe.otlp_traces_endpoint)
    stack.push_async_callback(asyncio.to_thread, tracing.close)
    return tracing


def _patience(config: RouterConfig) -> Patience:
    return Patience(
        timeout_s=config.request_timeout_secs,
        max_retries=config.retry_max_retries,
        initial_backoff_s=config.retry_initial_backoff_ms / 1000,
        max_backoff_s=config.retry_max_backoff_ms / 1000,
    )


async def _keep_up(state: RouterState, keepers: Sequence[Callable[[], None]]) -> None:
    """Follow who has come and gone, and give memory back, until cancelled."""
    while True:
        state.followers.follow(state.cluster.up, state.pools)
        state.breakers.keep((it.info.instance_id, it.info.epoch) for it in state.cluster.members())
        state.placer.keep(state.cluster.working())
        for keep in keepers:
            keep()
        state.feed.tree.tidy()
        state.observed.tick(time.monotonic())
        await asyncio.sleep(TIDY_S)


def _end_if_failed(task: asyncio.Task[None]) -> None:
    """A router that notices nobody's coming and going any more is worse than one that is started again."""
    if not task.cancelled() and task.exception() is not None:
        logger.critical("a part of the router failed; it cannot go on", exc_info=task.exception())
        os.kill(os.getpid(), signal.SIGTERM)


async def _serve_http(
    stack: AsyncExitStack,
    config: RouterConfig,
    generate: GenerateHandler,
    app: web.Application,
    door: Door,
) -> int:
    """Start the HTTP server; its port."""
    runner = web.AppRunner(
        app, access_log=None, logger=web_logger(), handler_cancellation=True, shutdown_timeout=1.0
    )
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    assert runner.server is not None
    front = Front(generate.handle, runner.server, door)
    stack.push_async_callback(front.close)
    return await front.listen(config.host, config.port)


async def _serve_metrics(stack: AsyncExitStack, config: RouterConfig, pages: Pages) -> None:
    """Serve them on a port of their own too, if that is wanted."""
    port, host = config.observe.metrics_port, config.observe.prometheus_host or config.host
    if port is None:
        return
    app = web.Application()
    app.router.add_get("/metrics", pages.metrics)
    runner = web.AppRunner(app, access_log=None, logger=web_logger(), shutdown_timeout=1.0)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        raise ConfigError(f"cannot serve metrics on {host}:{port}: {error.strerror}") from error
    logger.info("metrics ready http=http://%s:%d/metrics", bracketed(host), runner.addresses[0][1])


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


@web.middleware
async def _answer_errors(request: web.Request, handler: web.Handler) -> web.StreamResponse:  # type: ignore[name-defined]
    """Give aiohttp's own refusals (unknown path, wrong method) the envelope of all others."""
    try:
        return await handler(request)  # type: ignore[no-any-return]
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return json_response(
            failure(error.status, f"{request.method} {request.path}: {error.reason}").body(), error.status
        )
