"""Every SGLang internal that MemServe relies on, by name, for exactly one version of SGLang.

`test/unit/engine/test_seams.py` checks each of these against the installed SGLang and fails with
the seam's name and purpose when one has moved. Nothing here imports SGLang before it is asked to.
"""

from __future__ import annotations

import inspect
import pkgutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from memserve.core.errors import ConfigError

SGLANG_VERSION = "0.5.23"

_MOONCAKE = "sglang.srt.distributed.device_communicators.mooncake_transfer_engine"
TRANSFER_ENGINE = f"{_MOONCAKE}.MooncakeTransferEngine"
SIGTERM_HANDLER = "sglang.srt.managers.tokenizer_manager.SignalHandler.sigterm_handler"
SIGQUIT_HANDLER = "sglang.srt.managers.tokenizer_manager.SignalHandler.running_phase_sigquit_handler"
SIGINT_HANDLER = "uvicorn.Server.handle_exit"
SCHEDULER_MODULE = "sglang.srt.managers.scheduler"
INTERNAL_STATE = f"{SCHEDULER_MODULE}.Scheduler.get_internal_state"
LINKER_MODULE = "sglang.srt.mem_cache.unified_cache.unified_cache_linker"
OFFLOAD_NODE = f"{LINKER_MODULE}.UnifiedCacheLinkerWrapper._offload_node"
SHARED_ENGINE = f"{_MOONCAKE}:get_mooncake_transfer_engine"
CHECKPOINT = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.checkpoint_into_tree"
ARRIVAL = f"{SCHEDULER_MODULE}.Scheduler._prefetch_kvcache"
DECODE_QUEUE = "sglang.srt.disaggregation.decode.SchedulerDisaggregationDecodeMixin.process_decode_queue"
_INTERNAL_STATE = "sglang.srt.managers.scheduler_components.internal_state"
UPDATE_HANDLERS = f"{_INTERNAL_STATE}.SchedulerInternalStateController._update_handlers"
UPDATE_HANDLER = f"{_INTERNAL_STATE}:_UpdateHandler"
UPDATE_REJECTED = f"{_INTERNAL_STATE}:UpdateRejected"
EXTRA_KEY_NAMES = f"{SCHEDULER_MODULE}.Scheduler.init_kv_event_lora_names"
EVENTS_PUBLISHER = f"{SCHEDULER_MODULE}.Scheduler.init_kv_events_publisher"
BATCH_RESULT = f"{SCHEDULER_MODULE}.Scheduler.process_batch_result"
OBSERVABILITY = "sglang.srt.runtime_context:get_observability"
PAGE_HASH = "sglang.srt.mem_cache.utils:get_hash_str"
START_METHOD = "sglang.srt.entrypoints.engine._set_envs_and_config"
HTTP_SERVER = "sglang.srt.entrypoints.http_server"
PARALLEL_STATE = "sglang.srt.runtime_context:get_parallel"
ROOM_STATUS = "sglang.srt.disaggregation.common.conn.CommonKVManager.check_status"
ROOM_UPDATE = "sglang.srt.disaggregation.common.conn.CommonKVManager.update_status"
TRANSFER_WORKER = "sglang.srt.disaggregation.mooncake.conn.MooncakeKVManager.transfer_worker"
KV_SENDER = "sglang.srt.disaggregation.mooncake.conn:MooncakeKVSender"


@dataclass(frozen=True, slots=True)
class Seam:
    """One internal: where it is, what we use it for, and the parameters or members it must have."""

    name: str
    path: str
    used_for: str
    parameters: tuple[str, ...] = ()
    members: tuple[str, ...] = ()

    def problem(self) -> str | None:
        """What is wrong with this seam in the installed SGLang, or None."""
        try:
            target = pkgutil.resolve_name(self.path)
        except (ImportError, AttributeError) as error:
            return f"seam {self.name!r} is gone ({error}); it is used for {self.used_for}"
        missing = [member for member in self.members if not hasattr(target, member)]
        if self.parameters:
            known = inspect.signature(target).parameters
            missing += [parameter for parameter in self.parameters if parameter not in known]
        if missing:
            return f"seam {self.name!r} lacks {', '.join(missing)}; it is used for {self.used_for}"
        return None


SEAMS = (
    Seam(
        "platform",
        "sglang.srt.platforms.interface:SRTPlatform",
        "running without a GPU",
        members=(
            "get_device_total_memory",
            "get_current_memory_usage",
            "get_default_attention_backend",
            "get_torch_distributed_backend_str",
            "get_dispatch_key_name",
            "capabilities",
        ),
    ),
    Seam(
        "platform kind", "sglang.srt.platforms.interface:PlatformEnum", "being out of tree", members=("OOT",)
    ),
    Seam(
        "hooks",
        "sglang.srt.plugins.hook_registry:HookRegistry.register",
        "putting our transfer engine in Mooncake's place",
        parameters=("target", "hook", "hook_type"),
    ),
    Seam("hook kinds", "sglang.srt.plugins.hook_registry:HookType", "same", members=("REPLACE", "BEFORE")),
    Seam(
        "transfer engine",
        f"{_MOONCAKE}:MooncakeTransferEngine",
        "carrying the prefill to decode handoff",
        parameters=("hostname", "gpu_id", "ib_device"),
        members=(
            "register",
            "deregister",
            "batch_register",
            "batch_deregister",
            "transfer_sync",
            "batch_transfer_sync",
            "get_session_id",
            "send_probe",
            "get_ib_device",
        ),
    ),
    Seam("kv sender", KV_SENDER, "sending from host memory", members=("supports_host_tensor_indices",)),
    Seam(
        "http server",
        "sglang.srt.entrypoints.http_server:launch_server",
        "serving, and knowing when it is ready",
        parameters=("server_args", "launch_callback"),
    ),
    Seam(
        "start method",
        START_METHOD.replace(".engine.", ".engine:"),
        "forking a CPU server's processes, which spares them their imports",
        parameters=("server_args",),
    ),
    Seam(
        "server arguments",
        "sglang.srt.server_args:prepare_server_args",
        "reading SGLang's flags",
        parameters=("argv",),
    ),
    Seam(
        "resolution",
        "sglang.srt.server_args:ServerArgs",
        "finding bad flags early",
        members=("resolve_once",),
    ),
    Seam(
        "sigterm",
        SIGTERM_HANDLER.replace(".SignalHandler.", ":SignalHandler."),
        "leaving the router before requests are drained",
    ),
    Seam(
        "sigquit",
        SIGQUIT_HANDLER.replace(".SignalHandler.", ":SignalHandler."),
        "telling the router of a crash",
    ),
    Seam(
        "sigint",
        SIGINT_HANDLER.replace(".Server.", ":Server."),
        "draining on Ctrl-C as on SIGTERM",
        parameters=("sig", "frame"),
    ),
    Seam(
        "internal state",
        f"{SCHEDULER_MODULE}:Scheduler.get_internal_state",
        "reporting transfers in /server_info",
        parameters=("recv_req",),
    ),
    Seam(
        "linker",
        f"{LINKER_MODULE}:UnifiedCacheLinker",
        "the DRAM tier under the radix cache",
        members=(
            "lookup",
            "load",
            "start_layer_wise_loading",
            "finish_layer_wise_loading",
            "cancel_queued_load",
            "offload",
            "num_completed_offloads",
            "pop_completed_offload",
            "record_offload_ready",
            "reset",
            "close",
        ),
    ),
    Seam(
        "layer counter",
        f"{LINKER_MODULE}:LayerWiseLoadCounter",
        "loading layer by layer",
        members=("update_producer", "complete", "fail", "finish", "reset"),
    ),
    Seam(
        "offload of a node",
        f"{LINKER_MODULE}:UnifiedCacheLinkerWrapper._offload_node",
        "learning which page comes before the offloaded ones",
        parameters=("node_id", "transfers"),
    ),
    Seam(
        "page hash",
        PAGE_HASH,
        "having it compiled before the first request, which would wait for that",
        parameters=("token_ids", "prior_hash", "page_size"),
    ),
    Seam(
        "prefix hashes",
        "sglang.srt.mem_cache.unified_radix_cache:UnifiedRadixCache.get_prefix_hash_values",
        "same",
        parameters=("node_id",),
    ),
    Seam(
        "checkpoint",
        CHECKPOINT.replace(".UnifiedRadixCache.", ":UnifiedRadixCache."),
        "learning which request the offloaded pages are of",
        parameters=("req", "up_to"),
    ),
    Seam(
        "arrival",
        ARRIVAL.replace(".Scheduler.", ":Scheduler."),
        "telling the router the keys of a prompt that it knows by its text",
        parameters=("req",),
    ),
    Seam(
        "decode queue",
        DECODE_QUEUE.replace(".SchedulerDisagg", ":SchedulerDisagg"),
        "letting go of offloaded pages on decode",
    ),
    Seam(
        "cache events",
        "sglang.srt.mem_cache.unified_radix_cache:UnifiedRadixCache",
        "same",
        members=("check_hicache_events",),
    ),
    Seam(
        "update handlers",
        UPDATE_HANDLERS.replace(".SchedulerInternal", ":SchedulerInternal"),
        "resizing the DRAM tier through /set_internal_state",
    ),
    Seam("update handler", UPDATE_HANDLER, "same", parameters=("validate", "apply")),
    Seam("update rejected", UPDATE_REJECTED, "same"),
    Seam(
        "kv events",
        "sglang.srt.disaggregation.kv_events:EventPublisherFactory.register_publisher",
        "learning what the radix cache holds in HBM",
        parameters=("name", "ctor"),
    ),
    Seam(
        "kv events publisher",
        "sglang.srt.disaggregation.kv_events:EventPublisher",
        "same",
        members=("publish", "shutdown"),
    ),
    Seam(
        "stored event",
        "sglang.srt.disaggregation.kv_events:BlockStored",
        "same",
        members=("block_hashes", "parent_block_hash", "token_ids", "medium", "cache_salt", "lora_name"),
    ),
    Seam(
        "removed event",
        "sglang.srt.disaggregation.kv_events:BlockRemoved",
        "same",
        members=("block_hashes", "medium"),
    ),
    Seam("cleared event", "sglang.srt.disaggregation.kv_events:AllBlocksCleared", "same"),
    Seam("medium", "sglang.srt.disaggregation.kv_events:StorageMedium", "same", members=("GPU",)),
    Seam(
        "names in events",
        "sglang.srt.mem_cache.events:KvEventLoraNames.resolve",
        "learning the extra key of what is in HBM",
        parameters=("extra_key",),
    ),
    Seam("start of names in events", EXTRA_KEY_NAMES.replace(".Scheduler.", ":Scheduler."), "same"),
    Seam(
        "start of events",
        EVENTS_PUBLISHER.replace(".Scheduler.", ":Scheduler."),
        "joining the publisher of events to the pool",
    ),
    Seam(
        "events of a scheduler",
        "sglang.srt.managers.scheduler_components.kv_events_publisher:SchedulerKvEventsPublisher",
        "same",
        members=(
            "kv_event_publisher",
            "kv_events_config",
            "send_metrics_from_scheduler",
            "publish_kv_events",
        ),
    ),
    Seam(
        "batch result",
        BATCH_RESULT.replace(".Scheduler.", ":Scheduler."),
        "telling of a batch's blocks at once",
        parameters=("batch", "result"),
    ),
    Seam("observability", OBSERVABILITY, "reading --kv-events-config"),
    Seam(
        "kv events config",
        "sglang.srt.disaggregation.kv_events:KVEventsConfig.from_cli",
        "same",
        parameters=("cli_value",),
    ),
    Seam("parallel state", PARALLEL_STATE, "telling data-parallel ranks apart"),
    Seam("http app", f"{HTTP_SERVER}:app", "answering /mempool", members=("add_api_route",)),
    Seam("http state", f"{HTTP_SERVER}:get_global_state", "same"),
    Seam(
        "load snapshots",
        "sglang.srt.managers.load_snapshot:LoadSnapshot",
        "telling the router how busy a server is, and whether it is stuck",
        members=(
            *("timestamp", "dp_rank", "num_running_reqs", "num_waiting_reqs"),
            *("num_used_tokens", "max_total_num_tokens"),
        ),
    ),
    Seam(
        "load snapshot reader",
        "sglang.srt.managers.load_snapshot:ShmLoadSnapshotReader",
        "same",
        members=("read_all",),
    ),
    Seam(
        "room status",
        ROOM_STATUS.replace(".CommonKV", ":CommonKV"),
        "keeping a handoff's end from ending the thread that sends",
        parameters=("bootstrap_room",),
    ),
    Seam(
        "room update",
        ROOM_UPDATE.replace(".CommonKV", ":CommonKV"),
        "keeping two threads from undoing each other's status of a handoff",
        parameters=("bootstrap_room", "status"),
    ),
    Seam(
        "transfer worker",
        TRANSFER_WORKER.replace(".MooncakeKV", ":MooncakeKV"),
        "ending a prefill whose sending thread has ended",
    ),
    Seam("shared engine", SHARED_ENGINE, "finding the scheduler's transfer engine"),
    Seam("own address", "sglang.srt.utils.network:get_local_ip_auto", "telling others where we are"),
    Seam("process tree", "sglang.srt.utils:kill_process_tree", "leaving no child behind"),
)


def check_version() -> None:
    """Raises ConfigError unless exactly the SGLang these seams were checked against is installed."""
    try:
        installed = version("sglang")
    except PackageNotFoundError:
        raise ConfigError(
            "SGLang is not installed: run scripts/install.py (or pip install 'memserve[gpu]')"
        ) from None
    if installed != SGLANG_VERSION:
        raise ConfigError(
            f"SGLang {installed} is installed, this MemServe needs {SGLANG_VERSION}: run scripts/install.py"
        )
