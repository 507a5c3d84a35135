"""Contents of uploaded files and of batches' outputs: the seam, and its implementation in a folder."""

import errno
import io
import os
import re
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import Any, BinaryIO

from server.request.errors import ServiceError, TooLarge

_ID = re.compile(r"file-[A-Za-z0-9_-]{8,80}")
_PART = ".part"
_PIECE_BYTES = 256 * 1024


class NoSpace(ServiceError):
    """What holds the files or the records of batches is full."""

    status = 507
    code = "insufficient_storage"


class FilesUnavailable(ServiceError):
    """The contents of files cannot be read or written now. Nothing is lost: trying again later is right."""

    status = 503
    code = "batch_files_unavailable"


@contextmanager
def reaching_disk() -> Iterator[None]:
    """Turns what a disk, or a folder that several machines mount, fails with into `NoSpace` and `FilesUnavailable`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            full = "The gateway's disk is full: delete files that are no longer needed."
            raise NoSpace(full, retry_after_s=60) from None
        raise FilesUnavailable(
            f"The folder of batch files cannot be used: {error.strerror}. See that it is mounted and writable.",
            retry_after_s=5,
        ) from error


@contextmanager
def using_temporary_folder() -> Iterator[None]:
    """As `reaching_disk`, for what passes through the temporary folder only."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace("The gateway's temporary folder is full: try again later.", retry_after_s=60) from None
        raise FilesUnavailable(
            f"The gateway's temporary folder cannot be used: {error.strerror}.", retry_after_s=60
        ) from error


def checked(file_id: str) -> str:
    """The id itself. ValueError for one that we did not make: it must not lead out of the folder or the prefix."""
    if _ID.fullmatch(file_id) is None:
        raise ValueError(f"not a file id: {file_id[:100]!r}")
    return file_id


class Files(ABC):
    """One content for each file id. All methods block; any may raise `NoSpace` or `FilesUnavailable`, and calling it
    again is then right. The contract is tests/server/batch/test_files.py."""

    @abstractmethod
    def writing(self, file_id: str) -> AbstractContextManager[BinaryIO]:
        """Yields the new content; it is there, whole, once the block is left without an exception, and not before. It
        replaces an older one."""

    @abstractmethod
    def open(self, file_id: str) -> BinaryIO:
        """For reading, which may raise as all methods do; seekable. FileNotFoundError if there is none."""

    @abstractmethod
    def remove(self, file_id: str) -> None:
        """Removing what is not there is no error."""

    @abstractmethod
    def remove_parts(self, before: float) -> None:
        """Removes what gateways that were killed have left incomplete. before: seconds since 1970."""

    def renew(self, identity: str) -> None:  # noqa: B027 - most places keep what they are told
        """Makes what tells the identity look new, where something may delete what is old."""

    @abstractmethod
    def identity(self) -> str:
        """The same at every gateway that has these files, and nowhere else. ValueError or OSError if they cannot be
        used as they are configured."""

    def pieces(self, file_id: str) -> Iterator[bytes]:
        with self.open(file_id) as file:
            while piece := file.read(_PIECE_BYTES):
                yield piece


class FileFolder(Files):
    """One file a content, named by its id. What is incomplete ends in `.part`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._marker = folder.parent / "folder-id"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def path(self, file_id: str) -> Path:
        return self.folder / checked(file_id)

    @contextmanager
    def writing(self, file_id: str) -> Iterator[BinaryIO]:
        part = self.path(file_id).with_suffix(f".{token_hex(4)}{_PART}")  # two gateways may write the same file
        try:
            with reaching_disk():
                with part.open("wb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                part.replace(self.path(file_id))
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def open(self, file_id: str) -> BinaryIO:
        path = self.path(file_id)
        with reaching_disk():
            if path.exists() or not self._marker.exists():  # without the marker, this is not the folder at all
                return io.BufferedReader(_OnDisk(path), _PIECE_BYTES)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), file_id)

    def remove(self, file_id: str) -> None:
        path = self.path(file_id)
        with reaching_disk():
            try:
                path.unlink()
            except FileNotFoundError:
                if not self._marker.exists():  # as in `open`
                    raise

    def remove_parts(self, before: float) -> None:
        with reaching_disk():
            for part in self.folder.glob(f"*{_PART}"):
                with suppress(FileNotFoundError):  # another gateway was first
                    if part.stat().st_mtime < before:
                        part.unlink()

    def identity(self) -> str:
        """Kept in a file that only one gateway can create, through a hard link."""
        with suppress(FileExistsError):
            fresh = self._marker.with_suffix(f".{token_hex(8)}")
            fresh.write_text(token_hex(16))
            try:
                os.link(fresh, self._marker)
            finally:
                fresh.unlink()
        return self._marker.read_text()


class _OnDisk(io.FileIO):
    """A file for reading, whose failures are those of `reaching_disk`: a shared folder may go while it is open."""

    def readinto(self, buffer: Any) -> int | None:
        with reaching_disk():
            return super().readinto(buffer)

    def readall(self) -> bytes:
        with reaching_disk():
            return super().readall()


async def bounded(stream: AsyncIterator[bytes], most: int) -> AsyncGenerator[bytes, None]:
    """The stream itself. TooLarge once it is longer than `most` bytes."""
    size = 0
    async for piece in stream:
        size += len(piece)
        if size > most:
            raise TooLarge(f"The upload exceeds {most} bytes.")
        yield piece
