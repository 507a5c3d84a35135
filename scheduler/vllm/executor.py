"""How an engine computes on a CPU: inside the engine core's process, on cores of its own.

On a CPU vLLM starts a process for the model beside the one that schedules, because OpenMP reads from the environment,
when a process starts, where it may compute. The kernel takes the same word at any time. So vLLM's executor for one GPU
serves here, too: one process and one import of vLLM less at the start, and no messages between the two at each step.

The engine core itself is forked from the process that serves HTTP, as vLLM does it by default where it is used as a
library, rather than started anew: another import of vLLM less.
"""

import os
import signal

from vllm.v1.executor.uniproc_executor import UniProcExecutor

START_METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
_SERVER = os.getpid()  # imports this before it forks


class Pinned(UniProcExecutor):  # type: ignore[misc]  # vLLM is untyped here
    """Computes in this process, on the cores that VLLM_CPU_OMP_THREADS_BIND names ("2,3"; "nobind": on any)."""

    def _init_executor(self) -> None:
        if os.getpid() != _SERVER:
            signal.set_wakeup_fd(-1)  # else signals to this process would wake the event loop of the one it came from
        cores = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        if cores != "nobind":
            # The threads that this one starts from here on inherit its cores: OpenMP's and NIXL's.
            os.sched_setaffinity(0, [int(core) for core in cores.split(",")])
        super()._init_executor()


def __getattr__(name: str) -> type[Pinned]:
    """`PinnedExecutor`, for which vLLM asks by name, the last time right before it starts the engine core.

    vLLM's platform for CPUs has by then asked for a fresh process, for the sake of OpenMP's environment. Nothing has
    computed in this one yet, so OpenMP has no threads that a fork would lose.
    """
    if name != "PinnedExecutor":
        raise AttributeError(name)
    os.environ[START_METHOD] = "fork"
    return Pinned
