"""Keeps separate `evenhand` processes of one machine from taking the same GPU."""

import contextlib
import fcntl
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from deploy.machine.gpus import Gpu

UNFIT = re.compile(r"[^\w.-]")  # a MIG slice's old name has slashes


class GpuLocks:
    """One lock file for each GPU; the kernel gives a lock back when its holder ends, however that happens.

    folder: must be one for all users and processes that share the GPUs. Containers have their own, and there the
    runtime says who gets which GPU.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or Path(tempfile.gettempdir())
        self._held: dict[str, int] = {}

    @contextlib.contextmanager
    def planning(self) -> Iterator[None]:
        """Two processes that start at once plan one after the other."""
        descriptor = self._open("plan")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def free(self, gpus: Sequence[Gpu], *, shared: bool = False) -> list[Gpu]:
        """Those that nobody else has; `shared`: or that others share too. They are held from here on."""
        return [gpu for gpu in gpus if gpu.id in self._held or self._take(gpu, shared=shared)]

    def _take(self, gpu: Gpu, *, shared: bool) -> bool:
        descriptor = self._open(gpu.id)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        self._held[gpu.id] = descriptor
        return True

    def keep(self, ids: Sequence[str]) -> None:
        """Gives back all but these."""
        for gpu_id in set(self._held) - set(ids):
            os.close(self._held.pop(gpu_id))

    def close(self) -> None:
        self.keep(())

    def _open(self, name: str) -> int:
        """Another user's lock file can be locked but not written, so nothing is ever written."""
        path = self._folder / f"evenhand-gpu-{UNFIT.sub('_', name)}.lock"
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDONLY, 0o644))
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
