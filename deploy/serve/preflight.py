"""Checks everything that can be checked before the start, and plans the workers."""

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from deploy.engine.engine_args import (
    EngineArgsError,
    EnginePlan,
    allowed_threads,
    build_in_use,
    check_user_args,
    compiles,
    computes_in,
    cpu_dtype,
    default_kv_cache_gib,
    divide_cores,
    option_names,
    spreads,
)
from deploy.engine.engine_needs import Asking, ask_vllm, needs_of
from deploy.machine.gpu_plan import GpuPlan, GpuPlanError, Need, Share, check_crowding, plan_gpus
from deploy.machine.gpus import OLDEST_DRIVER, Gpu, driver_is_too_old, named
from deploy.machine.machine import GIB, Build, Machine
from deploy.model.hub import HubWeights, Weighing, fetched_here, weigh
from deploy.model.model import BUNDLED, BUNDLED_BYTES, MADE_HERE, TINY, ModelSource, resolve, stored_dtype
from deploy.settings import ServeSettings
from scheduler.workers import Role

# vLLM's processes for one CPU engine, without weights and KV cache: 0.7 + 0.9 GB resident were seen, or three of them.
ENGINE_BYTES = 2 * GIB
MIB = 1024**2
# An engine of several processes (on several GPUs, for one) passes batches through queues in /dev/shm: vLLM 0.32 does
# not start unless ten chunks of 24 MiB are free there. It fills little of them, so that more engines need no more.
SHARED_BYTES = 240 * MIB
DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.gguf")


# With these, weights take other room on a GPU than in their files, or none.
UNLIKE_FILES = {"--quantization", "--load-format", "--cpu-offload-gb", "--dtype"}


class PreflightError(Exception):
    """It cannot work here; the message says why and what to do."""


class TransferError(PreflightError):
    """Engines here cannot hand KV to each other."""


class SharedMemoryError(PreflightError):
    """/dev/shm is too small for an engine."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What was found: the build that will run, and the KV cache (GiB) and number format of each CPU engine.

    need: what each GPU engine takes. engine_bytes: what each CPU engine takes of the machine's memory.
    """

    build: Build
    kv_cache_gib: int
    dtype: str = ""
    need: Need = Need()
    engine_bytes: int = field(default=0, compare=False)


def worker_roles(settings: ServeSettings) -> dict[str, Role]:
    """Each worker's name and role, of all models. ValueError when prefill and decode are not both there, or nobody
    is."""
    return {name: role for one in settings.each() for name, role in _roles_of(one).items()}


def _roles_of(settings: ServeSettings) -> dict[str, Role]:
    label = settings.model[0].label
    prefill, decode, both = settings.prefill_workers, settings.decode_workers, settings.worker_count
    if bool(prefill) != bool(decode):
        raise ValueError("prefill and decode workers need each other: give both --prefill-workers and --decode-workers")
    if both is None:
        both = 0 if prefill else 1
    if not (prefill or both):
        raise ValueError("no worker is left to serve requests: give --workers 1 or more")
    names = {"prefill": (Role.PREFILL, prefill), "decode": (Role.DECODE, decode), "worker": (Role.BOTH, both)}
    roles = {f"{name}-{index}": role for name, (role, count) in names.items() for index in range(count)}
    return {f"{label}-{name}": role for name, role in roles.items()} if label else roles


def check_all(
    settings: ServeSettings, machine: Machine, cache: Path, ask: Asking = ask_vllm, weighing: Weighing = weigh
) -> list[Checked]:
    """`check` for each model, in memory and on GPUs that the models before it leave."""
    found: list[Checked] = []
    views, left = settings.each(), machine
    roles = worker_roles(settings)
    if settings.disaggregation.balance_roles and len(set(roles.values())) < len(Role):
        raise ValueError(
            "--balance-roles needs a worker of each kind: give --prefill-workers, --decode-workers and --workers"
        )
    for view in views:
        checked = check(view, left, cache, ask, weighing)
        found.append(checked)
        taken = checked.engine_bytes * len(_roles_of(view)) if checked.build == "cpu" else 0
        left = replace(left, available_bytes=left.available_bytes - taken)
    if len(views) > 1:
        gpu_plan(settings, machine, found)
    return found


def check(
    settings: ServeSettings, machine: Machine, cache: Path, ask: Asking = ask_vllm, weighing: Weighing = weigh
) -> Checked:
    """Looks at engine, model, memory and GPUs. ask: vLLM's reading of engine arguments. weighing: a hub's models.

    EngineArgsError, ModelError, PreflightError, GpuPlanError or ValueError says what is wrong.
    """
    if settings.workers:
        raise ValueError("`evenhand serve` starts its own workers: leave --worker out, or use `evenhand gateway`")
    check_user_args(settings.engine_args)
    build = build_in_use(machine)
    workers = len(worker_roles(settings))
    check_transfer(worker_roles(settings).values(), machine)
    check_shared_memory(settings, machine)
    if build == "cpu" and settings.compile and not machine.compiler:
        raise PreflightError(
            "--compile needs a C++ compiler, and there is no g++ here: install it (on Debian: apt install g++), "
            "or leave --compile out"
        )
    stored = stored_dtype(settings.source, cache)
    if build == "cuda":
        need = gpu_need(settings, gpu_weights_bytes(settings, cache, stored, weighing), ask)
        checked = Checked(build, settings.kv_cache_gib or 1, need=need)
        gpu_plan(settings, machine, [checked])
        return checked
    dtype = cpu_dtype(machine, stored)
    weights = weights_bytes(settings.source, cache, dtype)
    free = machine.available_bytes - workers * (ENGINE_BYTES + weights)
    kv_cache_gib = settings.kv_cache_gib or default_kv_cache_gib(free, workers)
    _check_memory(settings.source, machine, workers, weights, kv_cache_gib)
    return Checked(build, kv_cache_gib, dtype, engine_bytes=ENGINE_BYTES + weights + kv_cache_gib * GIB)


def gpu_weights_bytes(settings: ServeSettings, cache: Path, stored: str, weighing: Weighing) -> int:
    """What one copy of the weights takes of the GPUs' memory; 0 where that is not known."""
    if option_names(settings.engine_args) & UNLIKE_FILES:
        return 0
    if size := weights_bytes(settings.source, cache, stored):
        found = HubWeights(size, stored)
    elif settings.source in MADE_HERE or not fetched_here(settings.engine_args):
        return 0
    else:
        found = weighing(settings.source)
    return found.file_bytes // 2 if found.dtype == "float32" else found.file_bytes  # vLLM halves these by itself


def gpu_need(settings: ServeSettings, weights: int, ask: Asking) -> Need:
    """What each engine takes of the GPUs. EngineArgsError for arguments that cannot be."""
    needs = needs_of(settings.engine_args, ask)
    if needs.data_parallel > 1:
        raise EngineArgsError(
            "--data-parallel-size puts several schedulers behind one address, where the gateway cannot balance load or "
            f"keep fairness between them: use --workers {needs.data_parallel}, which gives each engine its own GPUs "
            "(to spread a mixture of experts over GPUs: --tensor-parallel-size with --enable-expert-parallel)"
        )
    return Need(needs.gpus, needs.utilization, weights // needs.nodes)  # each node has its part of the weights


def gpu_plan(settings: ServeSettings, machine: Machine, checked: Sequence[Checked]) -> GpuPlan:
    """The GPUs of each worker. checked: of each model. A model takes of what those before it leave, unless it names its
    GPUs. GpuPlanError if they do not suffice; PreflightError if --gpus names none that is here.

    Nobody's on a CPU.
    """
    if checked[0].build == "cpu":
        return GpuPlan({})
    free = _named_gpus(settings.gpus, machine)
    views = settings.each()
    shares: dict[str, Share] = {}
    remarks: list[str] = []
    for view, one in zip(views, checked, strict=True):
        own = view.model[0].gpus
        if not own and not free:
            raise GpuPlanError(
                f"the models before {view.source} take all GPUs: give each its own with --model {view.source},gpus=0, "
                "or start fewer workers"
            )
        gpus = _named_gpus(own, machine) if own else free
        plan = plan_gpus(gpus, list(worker_roles(view)), one.need, tell_idle=len(views) == 1)
        shares |= plan.shares
        remarks += plan.remarks
        taken = {gpu.id for share in plan.shares.values() for gpu in share.gpus}
        free = [gpu for gpu in free if gpu.id not in taken]
    check_crowding(shares)
    return GpuPlan(shares, tuple(remarks))


def driver_remarks(machine: Machine) -> list[str]:
    """A warning about a driver that is too old for the CUDA build: NVIDIA's compatibility package, which cannot be
    detected from here, may make up for it."""
    if machine.engine is None or machine.engine.build == "cpu" or not driver_is_too_old(machine.driver):
        return []
    return [
        f"the NVIDIA driver {machine.driver} is too old for CUDA 13: engines start only where cuda-compat-13-0 is "
        f"installed; else update the driver to {OLDEST_DRIVER} or newer"
    ]


def _named_gpus(names: str, machine: Machine) -> list[Gpu]:
    """The GPUs of a `--gpus`, all where it is empty. PreflightError for one that is not here."""
    if not names:
        return list(machine.gpus)
    gpus: list[Gpu] = []
    for part in (part.strip() for part in names.split(",")):
        if not (chosen := [gpu for gpu in named(machine.gpus, part) if gpu not in gpus]):
            there = ", ".join(dict.fromkeys(gpu.id if gpu.is_slice else f"{gpu.index}" for gpu in machine.gpus))
            raise PreflightError(
                f"--gpus {names}: {part!r} is named twice or is not one of the GPUs here, which are {there}"
            )
        gpus += chosen
    return gpus


def check_transfer(roles: Iterable[Role], machine: Machine) -> None:
    """TransferError if engines are to hand over KV and cannot."""
    if not machine.nixl and any(role is not Role.BOTH for role in roles):
        raise TransferError(
            "prefill and decode workers transfer KV with NIXL, which is not installed here: run `make install` "
            "(there is NIXL for Linux only), or use --workers N"
        )


def hands_over(settings: ServeSettings, machine: Machine) -> bool:
    """Whether engines of role `both` get a KV connector: where roles follow load, or objectives are named and there is
    another engine to hand over to."""
    if settings.disaggregation.balance_roles:
        return True
    return settings.slo.named and machine.nixl and len(_roles_of(settings)) > 1


def check_shared_memory(settings: ServeSettings, machine: Machine) -> None:
    """SharedMemoryError where an engine that is split over several processes would not start."""
    if machine.shared_bytes >= SHARED_BYTES or not spreads(settings.engine_args):
        return
    raise SharedMemoryError(
        f"too little shared memory: {machine.shared_bytes / MIB:.0f} MiB are free in /dev/shm, and an engine of "
        f"several processes needs {SHARED_BYTES / MIB:.0f} MiB: start the container with --shm-size=1g (Docker "
        "Compose: `shm_size: 1gb`; Kubernetes: mount an emptyDir of medium Memory there)"
    )


def _check_memory(model: str, machine: Machine, workers: int, weights: int, kv_cache_gib: int) -> None:
    one = ENGINE_BYTES + weights + kv_cache_gib * GIB
    if workers * one <= machine.available_bytes:
        return
    many = f"{workers} workers of " if workers > 1 else ""
    raise PreflightError(
        f"too little memory: {model} needs about {many}{one / GIB:.1f} GiB ({weights / GIB:.1f} weights, "
        f"{kv_cache_gib} KV cache, {ENGINE_BYTES / GIB:.0f} engine), and {machine.available_bytes / GIB:.1f} GiB are "
        f"free: free some memory, or use {'fewer --workers' if workers > 1 else 'a smaller model'}"
        + (", or a smaller --kv-cache-gib" if kv_cache_gib > 1 else "")
    )


def weights_bytes(model: str, cache: Path, dtype: str) -> int:
    """What the weights take in memory in this format, 0 for a hub's model. ModelError if it is not there."""
    if model == TINY:
        return 0
    stored = stored_dtype(model, cache)
    if model == BUNDLED:
        on_disk = BUNDLED_BYTES
    elif (folder := Path(resolve(model, cache).path)).is_dir():
        on_disk = max(sum(file.stat().st_size for file in folder.glob(kind)) for kind in WEIGHT_FILES)
    else:
        return 0
    return on_disk * DTYPE_BYTES.get(dtype, 4) // DTYPE_BYTES.get(stored, 4)


def promises_of(settings: ServeSettings, model: str) -> Mapping[str, float]:
    """What the scheduler inside an engine is told of service tiers, and of the time per token of its model."""
    tpot_s = settings.slo.of(model).tpot_s
    return {"flex_reserve": settings.tiers.flex_reserve} | ({} if tpot_s is None else {"tpot_s": tpot_s})


def plan_workers(
    settings: ServeSettings, machine: Machine, checked: Sequence[Checked], sources: Sequence[ModelSource]
) -> Mapping[str, EnginePlan]:
    """The engine of each worker, by its name. checked, sources: of each model."""
    views = settings.each()
    cores = divide_cores(machine.cores, len(worker_roles(settings)))
    allowed: list[tuple[int, ...]] = [()] * len(cores)
    if checked[0].build == "cpu":
        allowed = allowed_threads(machine.physical, cores)
    shares = gpu_plan(settings, machine, checked).shares
    places = iter(zip(cores, allowed, strict=True))
    return {
        name: EnginePlan(
            model=source.path,
            served_name=source.served_name,
            local=Path(source.path).is_dir(),
            build=one.build,
            dtype=one.dtype,
            compiled=view.compile,
            role=role,
            policy=view.policy,
            policy_options=view.policy_options,
            promises=promises_of(view, source.served_name),
            cores=own_cores,
            allowed=own_allowed,
            kv_cache_gib=one.kv_cache_gib,
            share=shares.get(name),
            hands_over=hands_over(view, machine),
            model_args=source.engine_args,
            user_args=tuple(view.engine_args),
            sleep_mode=one.build != "cpu" and view.sleep.after_s is not None,
            key=view.engine_key.get_secret_value() if view.engine_key else secrets.token_urlsafe(32),
        )
        for view, one, source in zip(views, checked, sources, strict=True)
        for (name, role), (own_cores, own_allowed) in zip(worker_roles(view).items(), places, strict=False)
    }


def in_words(plan: EnginePlan) -> str:
    """What an engine does and how, for a person: "reads prompts on CPU core 1, bfloat16, eager, 1 GiB KV cache"."""
    does = {Role.PREFILL: "reads prompts on ", Role.DECODE: "writes answers on ", Role.BOTH: ""}[plan.role]
    if plan.share is not None:
        return f"{does}{plan.share}"
    cores = "core" if len(plan.cores) == 1 else "cores"
    where = f"CPU {cores} {','.join(map(str, plan.cores))}"
    if plan.threads:
        where = f"{plan.threads} thread{'s' if plan.threads > 1 else ''} on {where}"
    dtype = computes_in(plan) or "vLLM's choice of number format"
    return f"{does}{where}, {dtype}, {'compiled' if compiles(plan) else 'eager'}, {plan.kv_cache_gib} GiB KV cache"
