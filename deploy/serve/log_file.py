"""A log file that cannot fill the disk: at a given size it becomes `NAME.1` and a new one begins."""

from pathlib import Path
from typing import BinaryIO

MOST_BYTES = 32 * 1024**2


class LogFile:
    """Appends lines to `path`, each written through at once, and keeps at most two files of `most_bytes`.

    A log that cannot be written must not stop what is logged: the first failure closes it and is kept in `failure`.
    """

    def __init__(self, path: Path, most_bytes: int = MOST_BYTES) -> None:
        self.path = path
        self.failure: OSError | None = None
        self._most_bytes = most_bytes
        self._size_bytes = 0
        self._file: BinaryIO | None = None

    def write(self, line: str) -> None:
        if self.failure is not None:
            return
        try:
            self._append(line.encode(errors="replace") + b"\n")
        except OSError as error:
            self.failure = error
            self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _append(self, line: bytes) -> None:
        if self._file is not None and self._size_bytes + len(line) > self._most_bytes:
            self.close()
            self.path.replace(self.path.with_name(self.path.name + ".1"))
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab", buffering=0)
            self._size_bytes = self._file.tell()
        self._size_bytes += self._file.write(line)
