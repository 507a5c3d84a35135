"""What the plug-in relies on and vLLM does not promise, and the check of it when an engine starts."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Final

from vllm.config import SchedulerConfig
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.core.sched.request_queue import RequestQueue, SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import Request, RequestStatus
from vllm.version import __version_tuple__ as vllm_version

OLDEST_VLLM: Final = (0, 26)
FIRST_UNTRIED_VLLM: Final = (0, 34)

METHODS: Final[Mapping[type, Mapping[str, tuple[str, ...]]]] = {
    Scheduler: {
        "__init__": ("vllm_config",),
        "schedule": (),
        "update_from_output": ("scheduler_output", "model_runner_output"),
        "add_request": ("request",),
        "has_requests": (),
        "has_unfinished_requests": (),
        "get_request_counts": (),
        "_preempt_request": ("request", "timestamp"),
        "_free_request": ("request",),
        "_free_blocks": ("request",),
        "_handle_stopped_request": ("request",),
        "_is_blocked_waiting_status": ("status",),
        "_update_after_schedule": ("scheduler_output",),
        "_update_request_with_output": ("request", "new_token_ids"),
    },
    RequestQueue: {
        "add_request": ("request",),
        "pop_request": (),
        "peek_request": (),
        "prepend_request": ("request",),
        "prepend_requests": ("requests",),
        "remove_request": ("request",),
        "remove_requests": ("requests",),
    },
    KVCacheManager: {"get_blocks": ("request_id",), "get_computed_blocks": ("request",)},
    BlockPool: {"touch": ("blocks",), "free_blocks": ("ordered_blocks",), "get_num_free_blocks": ()},
}
ATTRIBUTES: Final[Mapping[type, tuple[str, ...]]] = {
    Scheduler: (
        "vllm_config", "scheduler_config", "policy", "waiting", "running", "finished_req_ids_dict",
        "max_num_running_reqs", "max_num_scheduled_tokens", "num_waiting_for_streaming_input", "kv_cache_manager",
        "connector", "requests", "kv_cache_config", "num_spec_tokens", "_inflight_prefills",
        "max_model_len", "log_stats",
    ),
    SchedulerConfig: ("long_prefill_token_threshold",),
    KVCacheManager: ("block_pool",),
    KVCacheBlocks: ("blocks",),
    KVCacheBlock: ("block_hash", "ref_cnt", "is_null"),
    BlockPool: ("num_gpu_blocks",),
    Request: (
        "request_id", "client_index", "priority", "sampling_params", "pooling_params", "structured_output_request",
        "num_prompt_tokens", "num_output_tokens", "num_tokens", "num_computed_tokens", "num_output_placeholders",
        "max_tokens", "status", "num_preemptions", "resumable",
    ),
    RequestStatus: (
        "RUNNING", "PREEMPTED", "FINISHED_STOPPED", "FINISHED_LENGTH_CAPPED", "FINISHED_ABORTED",
    ),
    SchedulingPolicy: ("FCFS", "PRIORITY"),
    SchedulerOutput: ("scheduled_new_reqs", "total_num_scheduled_tokens", "num_scheduled_tokens"),
    NewRequestData: ("req_id", "num_computed_tokens"),
    EngineCoreOutput: ("request_id", "new_token_ids", "finish_reason", "kv_transfer_params"),
    EngineCoreOutputs: ("outputs",),
    FinishReason: ("STOP",),
}  # fmt: skip
# The last is `Scheduler`'s own from vLLM 0.33 on.
ASYNC_OVERRIDES: Final = frozenset({"__init__", "_update_after_schedule", "_update_request_with_output"})
ASYNC_ALWAYS_OVERRIDES: Final = frozenset({"__init__", "_update_after_schedule"})


def missing_members(
    methods: Mapping[type, Mapping[str, tuple[str, ...]]] = METHODS,
    attributes: Mapping[type, tuple[str, ...]] = ATTRIBUTES,
) -> list[str]:
    """What we rely on and this vLLM does not have, by name; empty if all is there."""
    missing = [
        f"{owner.__name__}.{name}({', '.join(parameters)})"
        for owner, members in methods.items()
        for name, parameters in members.items()
        if not _accepts(getattr(owner, name, None), parameters)
    ]
    missing += [
        f"{owner.__name__}.{name}" for owner, names in attributes.items() for name in names if not _has(owner, name)
    ]
    overrides = {name for name, member in vars(AsyncScheduler).items() if callable(member)}
    strange = (overrides - ASYNC_OVERRIDES) | (ASYNC_ALWAYS_OVERRIDES - overrides)
    return missing + [f"AsyncScheduler overrides other methods than we know of: {name}" for name in sorted(strange)]


def _accepts(method: object, parameters: tuple[str, ...]) -> bool:
    return callable(method) and set(parameters) <= set(inspect.signature(method).parameters)


def _has(owner: type, name: str) -> bool:
    """Whether instances have it: defined on the class, a field of it, or set by its constructor."""
    constructor = vars(owner).get("__init__")
    sets = getattr(constructor, "__code__", None)
    return hasattr(owner, name) or name in inspect.signature(owner).parameters or name in getattr(sets, "co_names", ())


def require_supported_vllm(version: tuple[int | str, ...] = vllm_version) -> None:
    """RuntimeError, in one sentence, unless this vLLM is one that the plug-in can work with."""
    release = tuple(version[:2])
    wanted = f">={_dotted(OLDEST_VLLM)},<{_dotted(FIRST_UNTRIED_VLLM)}"
    if not (all(isinstance(part, int) for part in release) and OLDEST_VLLM <= release < FIRST_UNTRIED_VLLM):
        raise RuntimeError(
            f"vLLM {_dotted(version)} is not supported by Evenhand's scheduler plug-in: install vllm{wanted}, "
            "or start the engine without --scheduler-cls"
        )
    if missing := missing_members():
        raise RuntimeError(
            f"vLLM {_dotted(version)} lacks what Evenhand's scheduler plug-in relies on ({'; '.join(missing)}): "
            f"install another vllm{wanted}, or start the engine without --scheduler-cls"
        )


def _dotted(version: Iterable[int | str]) -> str:
    return ".".join(str(part) for part in version)
