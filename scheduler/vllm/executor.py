"""How an engine computes on a CPU: inside the engine core's process, on cores of its own.

On a CPU vLLM starts a process for the model beside the one that schedules, because OpenMP reads from the environment,
when a process starts, where it may compute. The kernel takes the same word at any time. So vLLM's executor for one GPU
serves here, too: one process and one import of vLLM less at the start, and no messages between the two at each step.
"""

import os

from vllm.v1.executor.uniproc_executor import UniProcExecutor


class PinnedExecutor(UniProcExecutor):  # type: ignore[misc]  # vLLM is untyped here
    """Computes in this process, on the cores that VLLM_CPU_OMP_THREADS_BIND names ("2,3"; "nobind": on any)."""

    def _init_executor(self) -> None:
        cores = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        if cores != "nobind":
            # The threads that this one starts from here on inherit its cores: OpenMP's and NIXL's.
            os.sched_setaffinity(0, [int(core) for core in cores.split(",")])
        super()._init_executor()
