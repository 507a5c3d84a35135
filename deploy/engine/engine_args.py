"""Role, model, machine and policy → the command line and environment of one vLLM server. Pure."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from deploy.machine.gpu_plan import Share
from deploy.machine.machine import GIB, Build, Machine
from scheduler.workers import Role, Worker
from server.fleet.adapters import RUNTIME_UPDATES

MODULE = "vllm.entrypoints.openai.api_server"  # the console command `vllm` refuses to run in the CPU distribution
SCHEDULER = "scheduler.vllm.plugin.PolicyScheduler"
CONNECTOR = "scheduler.vllm.nixl"  # vLLM's own, on a CPU
EXECUTOR = "scheduler.vllm.executor.PinnedExecutor"
KEY_CHECK = "scheduler.vllm.key_check.KeyCheck"
KEY_NAME = "VLLM_API_KEY"  # by the environment, for everybody on the machine can read a command line
OLDEST, NEWEST_BELOW = (0, 26), (0, 34)

# vLLM's block is 128 tokens on a CPU: most short sequences then have no full block that the prefix cache could keep, so
# that a preemption recomputes everything. 32 is the smallest that its CPU kernels take.
CPU_BLOCK_TOKENS = 32
# A step computes a whole chunk of a prompt before anyone's next token. At about 250 prompt tokens a second (two AVX2
# cores, 135M parameters) vLLM's own 2,048 would stop every stream for eight seconds; this stops them for about one.
FLOAT32_CHUNK_TOKENS = 256
FLOAT32_SLOTS = 32
CPU_SLOTS = 128  # vLLM's own default for a server on a CPU
GPU_SLOTS = 256

# An idle engine needs two seconds of CPU to end; gateways have let running answers finish before.
SHUTDOWN_S = 12

# KV whose request died between two engines is held so long. Who waits for it renews the lease, every sixth of it.
KV_LEASE_S = 15

# What the supervisor decides: it must know where the engine listens and under which name.
RESERVED = {
    "--host": "the engine listens on 127.0.0.1, behind the gateway; `evenhand worker` has --address",
    "--port": "a free port is chosen for each engine",
    "--model": "use --model",
    "--served-model-name": "the model is served under the name of its folder",
    "--uds": "the gateway talks to the engine over TCP",
    "--config": "Evenhand's own options would override it: give each of its options as an --engine-arg",
    "--device-ids": "use --gpus, which other workers on this machine respect",
    "--api-key": "each engine gets a key of its own; EVENHAND_ENGINE_KEY sets it",
}


# With one of these an engine is several processes.
SPREADING = {
    *("--tensor-parallel-size", "--pipeline-parallel-size", "--data-parallel-size", "--data-parallel-size-local"),
    *("--nnodes", "--distributed-executor-backend"),
}


class EngineArgsError(ValueError):
    """An engine argument or version that cannot be used; the message says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePlan:
    """One engine, before it has a port.

    model: a folder or a hub id. local: whether it is a folder, so that no hub is asked.
    dtype: what it computes in; empty leaves the choice to vLLM. compiled: whether a CPU engine compiles the model
    before its first answer; a GPU engine always does.
    cores: where a CPU engine computes. allowed: where anything else of it may run (its HTTP server, for one): its own
    cores and those on which no engine computes; empty for anywhere. threads: how many compute, where that is not one on
    each core; the system then places them. kv_cache_gib: its KV cache, for a CPU engine.
    share: its GPUs, None on a CPU.
    promises: that the plug-in keeps: `flex_reserve` to that tier, and the objective `tpot_s`, the time per token.
    model_args: what this model needs; user_args: what the user gave, which wins over everything of ours.
    hands_over: one of role `both` has a KV connector too, so that it may take either half of a request.
    host: the address on which it listens, for gateways and for engines that fetch its KV.
    key: what it wants to be asked with; empty for no key. sleep_mode: whether it can be put to sleep, on a GPU.
    """

    model: str
    served_name: str
    local: bool
    build: Build
    dtype: str = ""
    compiled: bool = False
    role: Role = Role.BOTH
    policy: str = "fcfs"
    policy_options: Mapping[str, str] = field(default_factory=dict)
    promises: Mapping[str, float] = field(default_factory=dict)
    cores: tuple[int, ...] = ()
    allowed: tuple[int, ...] = ()
    threads: int = 0
    kv_cache_gib: int = 1
    share: Share | None = None
    model_args: tuple[str, ...] = ()
    user_args: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    hands_over: bool = False
    key: str = field(default="", repr=False)
    sleep_mode: bool = False

    @property
    def connected(self) -> bool:
        """Whether the engine has a KV connector."""
        return self.hands_over or self.role is not Role.BOTH


@dataclass(frozen=True, slots=True)
class Ports:
    """Free ports for one start: the HTTP server's, and the one over which NIXL engines find each other."""

    http: int
    side_channel: int


@dataclass(frozen=True, slots=True)
class EngineCommand:
    """What to run, and what to add to the environment. `url` is where it will answer.

    cores: where it computes. allowed: where anything of it may run; empty for anywhere.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str]
    url: str
    cores: tuple[int, ...] = ()
    allowed: tuple[int, ...] = ()


Options = dict[str, str | None]


def engine_command(plan: EnginePlan, ports: Ports, python: str) -> EngineCommand:
    """The vLLM server of `plan`, run by the interpreter `python`; EngineArgsError for an argument that we must give."""
    check_user_args(plan.user_args)
    options = _options(plan, ports)
    extra = (*plan.model_args, *plan.user_args)
    for name in option_names(extra):
        options.pop(name, None)
    ours = [part for name, value in options.items() for part in ((name,) if value is None else (name, value))]
    # -P: a folder called `scheduler` or `vllm` where the user stands must not be imported in place of the real one.
    # vLLM's own key check leaves out what is not below /v1; a middleware of the user's comes in addition to ours.
    guard = ("--middleware", KEY_CHECK) if plan.key else ()
    argv = (python, "-P", "-m", MODULE, *ours, *guard, *extra)
    host = f"[{plan.host}]" if ":" in plan.host else plan.host
    scheme = "https" if "--ssl-certfile" in option_names(extra) else "http"
    url = f"{scheme}://{host}:{ports.http}"
    return EngineCommand(argv, _environment(plan, ports), url, plan.cores, plan.allowed)


def check_user_args(user_args: Sequence[str]) -> None:
    """EngineArgsError for an argument that the supervisor decides."""
    for name in sorted(option_names(user_args) & set(RESERVED)):
        raise EngineArgsError(f"--engine-arg={name} cannot be given: {RESERVED[name]}")


def _options(plan: EnginePlan, ports: Ports) -> Options:
    options: Options = {
        "--model": plan.model,
        "--served-model-name": plan.served_name,
        "--host": plan.host,
        "--port": str(ports.http),
        "--disable-uvicorn-access-log": None,
        # From a request to stop to the engine's own end; without it vLLM kills what it has started itself.
        "--shutdown-timeout": str(SHUTDOWN_S),
        # Every engine carries the plug-in, under FCFS too, so that the policy can be changed while it runs.
        "--scheduler-cls": SCHEDULER,
        "--additional-config": json.dumps(
            {"evenhand": {"policy": plan.policy, "options": dict(plan.policy_options), **plan.promises}},
            separators=(",", ":"),
        ),
    }
    if plan.build == "cpu":
        options |= _cpu_options(plan)
    else:
        options |= _gpu_options(plan)
    if plan.connected:
        options["--kv-transfer-config"] = json.dumps(kv_transfer(plan.build), separators=(",", ":"))
    return options


def _gpu_options(plan: EnginePlan) -> Options:
    # The model's own context, or what of it the KV cache can hold: a long-context model starts on a small GPU too.
    options: Options = {"--max-model-len": "auto"}
    if plan.sleep_mode:
        options["--enable-sleep-mode"] = None
    if plan.share is not None and plan.share.sharers > 1:
        options["--gpu-memory-utilization"] = f"{plan.share.utilization:.2f}"
    return options


def _cpu_options(plan: EnginePlan) -> Options:
    # "auto" takes the model's own context, or what of it the KV cache can hold once.
    options: Options = {
        "--block-size": str(CPU_BLOCK_TOKENS),
        "--max-model-len": "auto",
        "--max-num-seqs": str(_cpu_slots(plan)),
    }
    if plan.cores and not spreads(plan.user_args):
        options["--distributed-executor-backend"] = EXECUTOR
    if plan.dtype:
        options["--dtype"] = plan.dtype
    if not plan.compiled:
        options["--enforce-eager"] = None
    if plan.dtype == "float32":
        options["--max-num-batched-tokens"] = str(FLOAT32_CHUNK_TOKENS)
    return options


def cpu_dtype(machine: Machine, stored: str) -> str:
    """What an engine computes in on this CPU with a model whose weights are stored as `stored` ("" if unknown).

    A format for which the CPU has no instructions is slow (float16 without AVX512-FP16: a ninth of the throughput of
    bfloat16), and compiled it has given wrong text with status 200 (bfloat16 on a CPU with AVX2 only).
    """
    if machine.fp16 and (stored == "float16" or not machine.bf16):
        return "float16"
    return "bfloat16" if machine.bf16 else "float32"


def computes_in(plan: EnginePlan) -> str:
    """The number format in which the engine computes, as far as its plan says: "" where vLLM chooses."""
    given = re.findall(r"--dtype[= ](\S+)", " ".join([*plan.model_args, *plan.user_args]))
    return given[-1].replace("auto", "") if given else plan.dtype


def compiles(plan: EnginePlan) -> bool:
    """Whether a CPU engine of `plan` compiles the model before its first answer."""
    spelt = [arg.partition("=")[0].replace("_", "-") for arg in (*plan.model_args, *plan.user_args)]
    given = [arg for arg in spelt if arg in ("--enforce-eager", "--no-enforce-eager")]
    return given[-1] == "--no-enforce-eager" if given else plan.compiled


def kv_transfer(build: Build) -> dict[str, object]:
    """vLLM's `--kv-transfer-config`: every engine hands KV over and takes it, over NIXL; its role is a preference.

    KV that did not arrive is computed again: the client gets its answer late in place of an error.
    """
    config: dict[str, object] = {
        "kv_connector": "NixlConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"kv_lease_duration": KV_LEASE_S},
    }
    return config | {"kv_buffer_device": "cpu", "kv_connector_module_path": CONNECTOR} if build == "cpu" else config


def _environment(plan: EnginePlan, ports: Ports) -> dict[str, str]:
    env = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "VLLM_LOGGING_COLOR": "0",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if plan.key:
        env[KEY_NAME] = plan.key
    if "--enable-lora" in option_names([*plan.model_args, *plan.user_args]):
        env[RUNTIME_UPDATES] = "True"  # the gateway loads and unloads adapters, behind the engine's key
    if plan.sleep_mode:
        env["VLLM_SERVER_DEV_MODE"] = "1"  # which has /sleep and /wake_up, behind the engine's key
    if plan.local:
        env["HF_HUB_OFFLINE"] = "1"
    if plan.build == "cpu":
        env["VLLM_CPU_KVCACHE_SPACE"] = str(plan.kv_cache_gib)
        env["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, plan.cores)) or "nobind"
        env["OMP_NUM_THREADS"] = str(plan.threads or max(1, len(plan.cores)))
    elif plan.share is not None:
        env["CUDA_VISIBLE_DEVICES"] = plan.share.ids
    if plan.connected:
        env |= {"VLLM_NIXL_SIDE_CHANNEL_HOST": plan.host, "VLLM_NIXL_SIDE_CHANNEL_PORT": str(ports.side_channel)}
    return env


def option_names(args: Sequence[str]) -> set[str]:
    """The long options that `args` set, spelt with dashes as vLLM does; `--no-x` sets `--x` too."""
    names = {arg.partition("=")[0].replace("_", "-") for arg in args if arg.startswith("--")}
    return names | {"--" + name.removeprefix("--no-") for name in names if name.startswith("--no-")}


def has_plugin(plan: EnginePlan) -> bool:
    """Whether the engine of `plan` runs our scheduler, and not one that the user chose."""
    return "--scheduler-cls" not in option_names(plan.user_args)


def worker_of(plan: EnginePlan, name: str, url: str) -> Worker:
    """What the gateway is told of the engine of `plan`, once it answers at `url`."""
    return Worker(
        name,
        url,
        plan.role,
        slots(plan),
        has_plugin(plan),
        hands_over=plan.connected,
        dtype=computes_in(plan),
        gpus=1 if plan.share is None else len(plan.share.gpus),
    )


def slots(plan: EnginePlan) -> int:
    """How many sequences the engine of `plan` runs at once: vLLM's `--max-num-seqs`."""
    args = [*plan.model_args, *plan.user_args]
    given = re.findall(r"--max[-_]num[-_]seqs[= ](\d+)", " ".join(args))
    if given:
        return int(given[-1])
    return _cpu_slots(plan) if plan.build == "cpu" else GPU_SLOTS


def _cpu_slots(plan: EnginePlan) -> int:
    return FLOAT32_SLOTS if plan.dtype == "float32" else CPU_SLOTS


def divide_cores(cores: Sequence[int], workers: int) -> list[tuple[int, ...]]:
    """Cores for each of `workers` engines, as even as may be.

    Where every engine gets one anyway, the first core is left to the gateway and the engines' own HTTP servers: a step
    waits for its slowest thread, and one that shares its core is slower than a step with one thread less. Engines
    without a core of their own take turns.
    """
    mine = list(cores[1:]) if len(cores) > workers else list(cores)
    if len(mine) < workers:
        return [(mine[index % len(mine)],) for index in range(workers)]
    edges = [round(len(mine) * index / workers) for index in range(workers + 1)]
    return [tuple(mine[start:end]) for start, end in zip(edges, edges[1:], strict=False)]


def allowed_threads(physical: Sequence[Sequence[int]], cores: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Where the rest of each engine may run, by the hardware threads of all physical cores and each engine's `cores`:
    on its own, and on those of no engine."""
    of = {thread: set(threads) for threads in physical for thread in threads}
    own = [set().union(*(of.get(core, {core}) for core in each)) for each in cores]
    spare = set().union(*physical) - set().union(*own)
    return [tuple(sorted(each | spare)) for each in own]


def spreads(user_args: Sequence[str]) -> bool:
    """Whether `user_args` make several processes of an engine. vLLM's parser knows all spellings, and is slow."""
    short = {arg.partition("=")[0] for arg in user_args}
    return bool(option_names(user_args) & SPREADING or short & {"-tp", "-pp", "-dp"})


def default_kv_cache_gib(free_bytes: int, workers: int) -> int:
    """KV cache for one CPU engine: an eighth of what engines and weights leave free, shared, from 1 to 4 GiB.

    vLLM fills all of it at its start, so it is taken from the rest of the machine, and knows whole GiB only.
    `free_bytes` may be negative: whether anything fits is another check.
    """
    return max(1, min(4, free_bytes // 8 // workers // GIB))


def check_version(version: str) -> None:
    """EngineArgsError unless the plug-in's contract with vLLM is known to hold for `version`."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if not found or not OLDEST <= (int(found.group(1)), int(found.group(2))) < NEWEST_BELOW:
        raise EngineArgsError(
            f"vLLM {version} is installed, and this version of Evenhand works with "
            f"{_dotted(OLDEST)} up to, but not including, {_dotted(NEWEST_BELOW)}: "
            "run `make install`, which installs a version that fits"
        )


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def build_in_use(machine: Machine) -> Build:
    """Which build will run; EngineArgsError when none is installed, when it does not fit, or lacks its GPU."""
    if machine.engine is None:
        raise EngineArgsError("vLLM is not installed here: run `make install`")
    check_version(machine.engine.version)
    if machine.engine.build == "cuda" and not machine.gpus:
        raise EngineArgsError(
            "the CUDA build of vLLM is installed, but no NVIDIA GPU is visible: check `nvidia-smi` and "
            "CUDA_VISIBLE_DEVICES, or run `make install` for the CPU build"
        )
    return machine.engine.build
