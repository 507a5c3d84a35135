"""Which engine computes on which GPUs. Pure: the GPUs and what each engine needs go in, an assignment comes out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deploy.engine.gpus import Gpu
from deploy.engine.machine import GIB

# vLLM's default for --gpu-memory-utilization, in version 0.32.
UTILIZATION = 0.92
# Beside weights and KV cache: the CUDA context, NCCL's buffers and the activations of one step.
BESIDE_BYTES = 3 * GIB
SMALLEST_KV = 1.1  # weights and a KV cache of a tenth of them


class GpuPlanError(Exception):
    """The GPUs do not suffice; the message says what is short and what to do."""


@dataclass(frozen=True, slots=True)
class Need:
    """What each engine needs on this machine.

    gpus: how many, None for all that are there for it (Ray decides where an engine computes).
    utilization: the part of each GPU's memory that the user gave it, None for a default.
    weights_bytes: of the model, 0 where it is not known.
    """

    gpus: int | None = 1
    utilization: float | None = None
    weights_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Share:
    """The GPUs of one engine. utilization: None where vLLM's default holds; sharers: engines on the same GPU."""

    gpus: tuple[Gpu, ...]
    utilization: float | None = None
    sharers: int = 1

    @property
    def ids(self) -> str:
        """For CUDA_VISIBLE_DEVICES."""
        return ",".join(gpu.id for gpu in self.gpus)

    def __str__(self) -> str:
        """For a person: "GPUs 0, 1 (2 x NVIDIA L4)"."""
        if len(self.gpus) == 1:
            return f"{self.gpus[0]}" + (f", shared by {self.sharers}" if self.sharers > 1 else "")
        numbers = ", ".join(f"{gpu.index}" for gpu in self.gpus)
        name = self.gpus[0].name
        return f"GPUs {numbers}" + (f" ({len(self.gpus)} x {name})" if name else "")


@dataclass(frozen=True, slots=True)
class GpuPlan:
    """An assignment for every engine, and what a person should know about it before anything starts."""

    shares: Mapping[str, Share]
    remarks: tuple[str, ...] = ()


def plan_gpus(gpus: Sequence[Gpu], engines: Sequence[str], need: Need, *, tell_idle: bool = True) -> GpuPlan:
    """GPUs for each of `engines` (names), all of which need the same. tell_idle: nobody else gets what is left.

    Neighbours in nvidia-smi's order are given to one engine, for they are the best connected. An engine of one GPU
    shares it with others where there are too few; one of several GPUs never does. GpuPlanError if it cannot be.
    """
    usable, remarks = _with_memory(gpus, engines, need)
    each = need.gpus or max(1, len(usable) // len(engines))
    if each > 1 and any(gpu.is_slice for gpu in usable):
        raise GpuPlanError(f"an engine of {each} GPUs cannot be had from MIG slices, which cannot talk to each other")
    if each * len(engines) <= len(usable):
        shares = {
            name: Share(tuple(usable[at * each : (at + 1) * each]), need.utilization) for at, name in enumerate(engines)
        }
    elif each == 1:
        shares = _shared(usable, engines, need)
    else:
        raise GpuPlanError(_too_few(len(usable), len(engines), each))
    _check_weights(shares, need)
    taken = {gpu.id for share in shares.values() for gpu in share.gpus}
    idle = [gpu for gpu in usable if gpu.id not in taken] if tell_idle else []
    return GpuPlan(shares, (*remarks, *_sharing(shares), *_idle(idle, len(engines), each)))


def _shared(gpus: Sequence[Gpu], engines: Sequence[str], need: Need) -> dict[str, Share]:
    """Engines in turn on each GPU; its memory is divided among them."""
    shares = {}
    for at, name in enumerate(engines):
        gpu = gpus[at % len(gpus)]
        sharers = len(engines[at % len(gpus) :: len(gpus)])
        utilization = need.utilization or (int(90 / sharers) / 100 if sharers > 1 else None)
        if (need.utilization or 0) * sharers > 1:
            raise GpuPlanError(
                f"{sharers} engines share {gpu}, and each is to take {need.utilization:.0%} of its memory: give "
                f"--engine-arg=--gpu-memory-utilization={0.9 / sharers:.2f} or less, or leave it out"
            )
        shares[name] = Share((gpu,), utilization, sharers)
    return shares


def check_crowding(shares: Mapping[str, Share]) -> None:
    """GpuPlanError if engines that were planned apart are to take more of a GPU than there is."""
    parts: dict[str, dict[str, float]] = {}
    for name, share in shares.items():
        for gpu in share.gpus:
            parts.setdefault(gpu.id, {})[name] = share.utilization or UTILIZATION
    for share in shares.values():
        for gpu in share.gpus:
            if len(on_it := parts[gpu.id]) > 1 and sum(on_it.values()) > 1:
                raise GpuPlanError(
                    f"{' and '.join(on_it)} are all to be on {gpu}, and take {sum(on_it.values()):.0%} of its memory: "
                    "let each model take a part with --engine-arg=NAME:--gpu-memory-utilization=0.45"
                )


def _with_memory(gpus: Sequence[Gpu], engines: Sequence[str], need: Need) -> tuple[list[Gpu], list[str]]:
    """The GPUs whose memory is free, if they suffice. GpuPlanError if it is other programs that are in the way."""
    if not gpus:
        raise GpuPlanError("no GPU is there to plan with: check `nvidia-smi`, CUDA_VISIBLE_DEVICES and --gpus")
    wanted = need.utilization or UTILIZATION
    busy = [gpu for gpu in gpus if gpu.free_bytes and gpu.free_bytes < wanted * gpu.total_bytes]
    free = [gpu for gpu in gpus if gpu not in busy]
    if not busy:
        return free, []
    if not free or (need.gpus or 1) * len(engines) > len(free):
        worst = min(busy, key=lambda gpu: gpu.free_bytes / gpu.total_bytes)
        fits = int(100 * worst.free_bytes / worst.total_bytes - 2) / 100
        smaller = f", or take less with --engine-arg=--gpu-memory-utilization={fits:.2f}" if fits > 0.1 else ""
        raise GpuPlanError(
            f"{worst} has {_gib(worst.free_bytes)} of {_gib(worst.total_bytes)} GiB free, and an engine takes "
            f"{_gib(wanted * worst.total_bytes)}: end what uses it (`nvidia-smi` lists it), choose others with --gpus"
            f"{smaller}"
        )
    return free, [f"{gpu} is left alone: {_gib(gpu.total_bytes - gpu.free_bytes)} GiB of it are in use" for gpu in busy]


def _check_weights(shares: Mapping[str, Share], need: Need) -> None:
    """GpuPlanError if the weights cannot fit; it names the tensor parallelism with which they do."""
    for share in shares.values():
        room = min((_room(gpu, share) for gpu in share.gpus if gpu.total_bytes), default=0.0)
        if not room or need.weights_bytes * SMALLEST_KV <= room * len(share.gpus):
            continue
        gpu, count = share.gpus[0], len(share.gpus)
        wanted = tensor_parallel(need.weights_bytes, gpu, share.utilization or UTILIZATION)
        where = f"{gpu} has" if count == 1 else f"{count} GPUs like {gpu} have"
        raise GpuPlanError(
            f"the weights take {_gib(need.weights_bytes)} GiB, and {where} room for {_gib(room * count)}: spread the "
            f"model over {wanted} GPUs with --engine-arg=--tensor-parallel-size={wanted}, or quantize it"
        )


def _room(gpu: Gpu, share: Share) -> float:
    """Bytes of one GPU that weights and KV cache may take."""
    return (share.utilization or UTILIZATION) * gpu.total_bytes - BESIDE_BYTES


def tensor_parallel(weights_bytes: int, gpu: Gpu, utilization: float = UTILIZATION) -> int:
    """The least power of two of such GPUs that hold the weights and some KV cache; heads divide by powers of two."""
    size = 1
    room = utilization * gpu.total_bytes - BESIDE_BYTES
    while size < 64 and weights_bytes * SMALLEST_KV > room * size:
        size *= 2
    return size


def _too_few(gpus: int, engines: int, each: int) -> str:
    fewer = gpus // each
    ways = f"use --workers {fewer}" if fewer else "use a machine with more"
    many = f"{engines} engines of {each} GPUs" if engines > 1 else f"an engine of {each} GPUs"
    return (
        f"{many} need {each * engines}, and {gpus} {'is' if gpus == 1 else 'are'} free here: {ways}, or spread each "
        "over fewer with --engine-arg=--tensor-parallel-size"
    )


def _sharing(shares: Mapping[str, Share]) -> list[str]:
    crowds: dict[str, list[str]] = {}
    for name, share in shares.items():
        if share.sharers > 1:
            crowds.setdefault(str(share.gpus[0]), []).append(name)
    return [f"{' and '.join(names)} share {gpu}: they start one after the other" for gpu, names in crowds.items()]


def _idle(idle: Sequence[Gpu], engines: int, each: int) -> list[str]:
    if not idle:
        return []
    more = engines + len(idle) // each
    ways = [f"--workers {more} has a copy of the model on each"] if more > engines else []
    if engines == 1:
        ways.append(f"--engine-arg=--tensor-parallel-size={_power_of_two(len(idle) + each)} spreads one over them")
    numbers = ", ".join(dict.fromkeys(f"{gpu.index}" for gpu in idle))
    return [f"GPU{'s' if len(idle) > 1 else ''} {numbers} stay{'' if len(idle) > 1 else 's'} idle: {'; '.join(ways)}"]


def _power_of_two(most: int) -> int:
    return 1 << (most.bit_length() - 1)


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}"
