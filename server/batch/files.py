"""Contents of uploaded files and of batches' outputs, in one folder."""

import errno
import os
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import BinaryIO

from server.request.errors import ServiceError, TooLarge

_ID = re.compile(r"file-[A-Za-z0-9_-]{8,80}")
_PART = ".part"
_PIECE_BYTES = 256 * 1024


class NoSpace(ServiceError):
    """The disk under the state folder is full."""

    status = 507
    code = "insufficient_storage"


@contextmanager
def room_on_disk() -> Iterator[None]:
    """Turns "no space left" into `NoSpace`."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise NoSpace("The gateway's disk is full: delete files that are no longer needed.", retry_after_s=60) from None


class FileFolder:
    """One file a content, named by its id. What is incomplete ends in `.part`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def path(self, file_id: str) -> Path:
        """ValueError for an id that we did not make: it must not lead out of the folder."""
        if _ID.fullmatch(file_id) is None:
            raise ValueError(f"not a file id: {file_id[:100]!r}")
        return self.folder / file_id

    @contextmanager
    def writing(self, file_id: str) -> Iterator[BinaryIO]:
        """Yields the new content; it is there, whole and on disk, once the block is left without an exception."""
        part = self.path(file_id).with_suffix(f".{token_hex(4)}{_PART}")  # two gateways may write the same file
        try:
            with room_on_disk(), part.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            part.replace(self.path(file_id))
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def open(self, file_id: str) -> BinaryIO:
        """FileNotFoundError if there is none."""
        return self.path(file_id).open("rb")

    def pieces(self, file_id: str) -> Iterator[bytes]:
        with self.open(file_id) as file:
            while piece := file.read(_PIECE_BYTES):
                yield piece

    def remove(self, file_id: str) -> None:
        self.path(file_id).unlink(missing_ok=True)

    def remove_parts(self, before: float) -> None:
        """Removes what gateways that were killed have left incomplete. before: seconds since 1970."""
        for part in self.folder.glob(f"*{_PART}"):
            with suppress(FileNotFoundError):  # another gateway was first
                if part.stat().st_mtime < before:
                    part.unlink()

    def identity(self) -> str:
        """The same at every gateway that has this folder, wherever it is mounted, and nowhere else."""
        kept = self.folder.parent / "folder-id"
        with suppress(FileExistsError):
            fresh = self.folder.parent / f"folder-id.{token_hex(8)}"
            fresh.write_text(token_hex(16))
            try:
                os.link(fresh, kept)
            finally:
                fresh.unlink()
        return kept.read_text()


async def bounded(stream: AsyncIterator[bytes], most: int) -> AsyncGenerator[bytes, None]:
    """The stream itself. TooLarge once it is longer than `most` bytes."""
    size = 0
    async for piece in stream:
        size += len(piece)
        if size > most:
            raise TooLarge(f"The upload exceeds {most} bytes.")
        yield piece
