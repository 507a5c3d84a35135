"""Which engine computes on which GPUs. Pure: the GPUs and what each engine needs go in, an assignment comes out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deploy.machine.gpus import OLDEST_CAPABILITY, Gpu
from deploy.machine.machine import GIB

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
        """For a person: "GPUs 0-3 (4 x NVIDIA L4)"."""
        if len(self.gpus) == 1:
            return f"{self.gpus[0]}" + (f", {self.utilization:.0%} of its memory" if self.utilization else "")
        name = self.gpus[0].name
        return _numbered(self.gpus) + (f" ({len(self.gpus)} x {name})" if name else "")


@dataclass(frozen=True, slots=True)
class GpuPlan:
    """An assignment for every engine, and what a person should know about it before anything starts."""

    shares: Mapping[str, Share]
    remarks: tuple[str, ...] = ()


def plan_gpus(gpus: Sequence[Gpu], engines: Sequence[str], need: Need, *, tell_idle: bool = True) -> GpuPlan:
    """GPUs for each of `engines` (names), all of which have the same needs. tell_idle: GPUs left over stay unused.

    Neighbours in nvidia-smi's order are given to one engine, for they are the best connected. An engine of one GPU
    shares it with others where there are too few; one of several GPUs never does. GpuPlanError if it cannot be.
    """
    modern, remarks = _new_enough(gpus)
    usable, in_use = _with_memory(modern, engines, need)
    each = need.gpus or max(1, len(usable) // len(engines))
    if each > 1 and any(gpu.is_slice for gpu in usable):
        raise GpuPlanError(
            f"an engine cannot span {each} MIG slices, because slices cannot exchange data: give each engine one slice "
            "(leave out --tensor-parallel-size and its like), or choose whole GPUs with --gpus"
        )
    if each * len(engines) <= len(usable):
        shares = {
            name: Share(tuple(usable[at * each : (at + 1) * each]), need.utilization) for at, name in enumerate(engines)
        }
    elif each == 1:
        shares = _shared(usable, engines, need)
    else:
        raise GpuPlanError(_too_few(len(usable), len(engines), each))
    _check_weights(shares, need, len(usable))
    taken = {gpu.id for share in shares.values() for gpu in share.gpus}
    idle = [gpu for gpu in usable if gpu.id not in taken] if tell_idle else []
    return GpuPlan(shares, (*remarks, *in_use, *_sharing(shares), *_idle(idle, len(engines), each)))


def _shared(gpus: Sequence[Gpu], engines: Sequence[str], need: Need) -> dict[str, Share]:
    """Engines in turn on each GPU; its memory is divided among them."""
    shares = {}
    for at, name in enumerate(engines):
        gpu = gpus[at % len(gpus)]
        sharers = len(engines[at % len(gpus) :: len(gpus)])
        utilization = need.utilization or (int(90 / sharers) / 100 if sharers > 1 else None)
        if (need.utilization or 0) * sharers > 1:
            raise GpuPlanError(
                f"{sharers} engines share {gpu}, and each is set to take {need.utilization:.0%} of its memory: lower "
                f"that to --engine-arg=--gpu-memory-utilization={int(90 / sharers) / 100:.2f}, or leave it out"
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
                    f"{' and '.join(on_it)} are placed on {gpu} and would take {sum(on_it.values()):.0%} of its "
                    "memory: limit each model with --engine-arg=NAME:--gpu-memory-utilization=0.45"
                )


def _new_enough(gpus: Sequence[Gpu]) -> tuple[list[Gpu], list[str]]:
    """The GPUs on which vLLM runs, if there are any."""
    if not gpus:
        raise GpuPlanError("no GPU is visible: check `nvidia-smi`, CUDA_VISIBLE_DEVICES and --gpus")
    usable = [gpu for gpu in gpus if not gpu.is_too_old]
    old = [
        f"{gpu} is left out: its compute capability is {'.'.join(map(str, gpu.capability))}, and vLLM needs "
        f"{'.'.join(map(str, OLDEST_CAPABILITY))} (Turing) or newer"
        for gpu in gpus
        if gpu.is_too_old
    ]
    if not usable:
        raise GpuPlanError(f"no GPU can be used: {'; '.join(old)}")
    return usable, old


def _with_memory(gpus: Sequence[Gpu], engines: Sequence[str], need: Need) -> tuple[list[Gpu], list[str]]:
    """The GPUs whose memory is free, if they suffice. GpuPlanError if it is other programs that are in the way."""
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
            f"{_gib(wanted * worst.total_bytes)}: stop the programs that use it (`nvidia-smi` lists them), choose "
            f"other GPUs with --gpus{smaller}"
        )
    return free, [
        f"{gpu} is left out: other programs use {_gib(gpu.total_bytes - gpu.free_bytes)} GiB of its memory"
        for gpu in busy
    ]


def _check_weights(shares: Mapping[str, Share], need: Need, there: int) -> None:
    """GpuPlanError if the weights cannot fit; it says what holds them. there: how many GPUs can be used."""
    for share in shares.values():
        room = min((_room(gpu, share) for gpu in share.gpus if gpu.total_bytes), default=0.0)
        if not room or need.weights_bytes * SMALLEST_KV <= room * len(share.gpus):
            continue
        gpu, count = share.gpus[0], len(share.gpus)
        if room <= 0:
            raise GpuPlanError(
                f"{share} is too little for an engine, which takes {_gib(BESIDE_BYTES)} GiB besides weights and KV "
                f"cache: use {'fewer --workers' if share.sharers > 1 else 'a larger part of it or a larger GPU'}"
            )
        where = f"{share} has" if count == 1 else f"{count} GPUs like {gpu} have"
        raise GpuPlanError(
            f"the weights ({_gib(need.weights_bytes)} GiB) and a minimal KV cache need "
            f"{_gib(need.weights_bytes * SMALLEST_KV)} GiB, and {where} room for {_gib(room * count)}: "
            f"{_what_holds(need.weights_bytes, share, there)}"
        )


def _what_holds(weights_bytes: int, share: Share, there: int) -> str:
    gpu = share.gpus[0]
    if share.sharers > 1:
        return "use fewer --workers, or a quantized model"
    if gpu.is_slice:
        return "use a larger slice or a whole GPU, or a quantized model"
    wanted = tensor_parallel(weights_bytes, gpu, share.utilization or UTILIZATION)
    if wanted <= there:
        return f"split the model across {wanted} GPUs with --engine-arg=--tensor-parallel-size={wanted}, or quantize it"
    return f"use a quantized or a smaller model ({wanted} such GPUs would hold this one)"


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
    many = f"{engines} engines of {each} GPUs need {each * engines}" if engines > 1 else f"an engine needs {each} GPUs"
    return (
        f"{many}, and {gpus} {'is' if gpus == 1 else 'are'} free here: {ways}, or split each engine across fewer with "
        "--engine-arg=--tensor-parallel-size"
    )


def _sharing(shares: Mapping[str, Share]) -> list[str]:
    crowds: dict[str, list[str]] = {}
    for name, share in shares.items():
        if share.sharers > 1:
            crowds.setdefault(str(share.gpus[0]), []).append(name)
    return [f"{' and '.join(names)} share {gpu} and start one after the other" for gpu, names in crowds.items()]


def _idle(idle: Sequence[Gpu], engines: int, each: int) -> list[str]:
    if not idle:
        return []
    more = engines + len(idle) // each
    ways = [f"--workers {more} runs {more} copies of the model"] if more > engines else []
    if engines == 1 and not any(gpu.is_slice for gpu in idle):
        wide = _power_of_two(len(idle) + each)
        ways.append(f"--engine-arg=--tensor-parallel-size={wide} splits one copy across {wide} GPUs")
    said = f": {'; '.join(ways)}" if ways else ""
    return [f"{_numbered(idle)} {'is' if len(idle) == 1 else 'are'} idle{said}"]


def _numbered(gpus: Sequence[Gpu]) -> str:
    """Several GPUs by their numbers: "GPUs 0, 2-7"."""
    if any(gpu.is_slice for gpu in gpus):
        return ", ".join(map(str, gpus))
    runs: list[list[int]] = []
    for index in sorted({gpu.index for gpu in gpus}):
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    parts = (f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
    return f"GPU{'s' if len(gpus) > 1 else ''} {', '.join(parts)}"


def _power_of_two(most: int) -> int:
    return 1 << (most.bit_length() - 1)


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}"
