"""Contents of batch files in a bucket of S3, or of a store that speaks its protocol, through fsspec and s3fs.

Neither package is imported unless a bucket is configured. An upload appears whole or not at all: S3 promises that for a
single PUT and for a multipart upload, so nothing is renamed.
"""

import errno
import io
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from secrets import token_hex
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import urlsplit

from server.batch.files import Files, FilesUnavailable, NoSpace, checked, using_temporary_folder
from server.request.errors import ServiceError

log = logging.getLogger("evenhand.batch")

READ_BYTES = 1024 * 1024  # of one request: some hundred lines of an input file
PART_BYTES = 8 * 1024 * 1024  # of an upload; as many as `PARTS_AT_ONCE` are in memory
PARTS_AT_ONCE = 2
TRIES = 2  # of s3fs, each of as many tries of botocore: it gives up within seconds, and batches pause
CONNECT_S = 3
READ_S = 15
FULL = ("QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded")

T = TypeVar("T")


def object_files(url: str) -> "ObjectFiles":
    """The files under a URL such as `s3://bucket/prefix`. ValueError if it is none, or s3fs is not installed."""
    try:
        parts = urlsplit(url)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme != "s3" or not parts.netloc or "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            "batch.files_url must be s3://BUCKET or s3://BUCKET/PREFIX; credentials and the address of another store "
            "than AWS come from the environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL"
        )
    try:
        from botocore.exceptions import NoCredentialsError, PartialCredentialsError
        from s3fs import S3FileSystem
    except ImportError as error:
        raise ValueError(f"batch.files_url needs the package s3fs ({error}): pip install 'evenhand[s3]'") from None
    tries = {"mode": "standard", "total_max_attempts": TRIES}
    system = S3FileSystem(
        config_kwargs={"connect_timeout": CONNECT_S, "read_timeout": READ_S, "retries": tries},
        use_listings_cache=False,
    )
    system.retries = TRIES
    root = f"{parts.netloc}{parts.path}".rstrip("/")
    return ObjectFiles(system, root, (PermissionError, NoCredentialsError, PartialCredentialsError))


class ObjectFiles(Files):
    """One object a content, named by its id.

    system: a file system of fsspec. root: bucket and prefix. refusals: its errors that time does not mend.
    """

    def __init__(self, system: Any, root: str, refusals: tuple[type[Exception], ...] = (PermissionError,)) -> None:
        self.system = system
        self.root = root
        self.refusals = refusals
        self._failing = ""  # with what, so that a store that is away does not fill the log
        self._marker = f"{root}/folder-id"

    def path(self, file_id: str) -> str:
        return f"{self.root}/{checked(file_id)}"

    @contextmanager
    def writing(self, file_id: str) -> Iterator[BinaryIO]:
        path = self.path(file_id)
        self._size(self._marker)  # fails at once while the store is away: an output is costly to collect
        with using_temporary_folder(), tempfile.TemporaryFile() as file:  # without a name: a kill leaves nothing behind
            yield file
            file.seek(0)  # flushes, too
            put = partial(self.system.put_file, f"/dev/fd/{file.fileno()}", path)
            self._asked(lambda: put(chunksize=PART_BYTES, max_concurrency=PARTS_AT_ONCE))

    def open(self, file_id: str) -> BinaryIO:
        path = self.path(file_id)
        size = self._size(path)
        if size is None:
            if self._size(self._marker) is None:
                raise FilesUnavailable("The bucket of batch files is not there, or was emptied.", retry_after_s=60)
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), file_id)

        def read(start: int, end: int) -> bytes:
            return cast(bytes, self._asked(lambda: self.system.cat_file(path, start=start, end=end)))

        return io.BufferedReader(_Object(read, size), READ_BYTES)

    def _size(self, path: str) -> int | None:
        """None if there is no such object."""

        def ask() -> int | None:
            try:
                return int(self.system.info(path)["size"])
            except FileNotFoundError:
                return None

        return self._asked(ask)

    def remove(self, file_id: str) -> None:
        path = self.path(file_id)

        def ask() -> None:
            with suppress(FileNotFoundError):
                self.system.rm_file(path)

        self._asked(ask)

    def remove_parts(self, before: float) -> None:
        """Ends multipart uploads that nobody goes on with: they are seen by the bill only."""
        bucket, _, ours = self.path("file-00000000").removesuffix("00000000").partition("/")
        for upload in self._uploads(bucket, ours):
            if upload["Initiated"].timestamp() < before:
                self._asked(partial(self._abort, bucket, upload["Key"], upload["UploadId"]))

    def _uploads(self, bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
        """Multipart uploads that are not complete, page by page."""
        after: dict[str, str] = {}
        while True:
            ask = partial(self.system.call_s3, "list_multipart_uploads", Bucket=bucket, Prefix=prefix, **after)
            page = self._asked(ask)
            yield from page.get("Uploads", [])
            if not page.get("IsTruncated"):
                return
            after = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def _abort(self, bucket: str, key: str, upload: str) -> None:
        with suppress(FileNotFoundError):  # another gateway was first
            self.system.abort_mpu(bucket, key, upload)

    def renew(self, identity: str) -> None:
        """Writes the identity once more: a lifecycle rule goes by an object's age."""
        if self._asked(self._kept) == identity:
            self._asked(partial(self.system.pipe_file, self._marker, identity.encode()))
            return
        log.error(
            "%s is gone or was replaced, and gateways that start will be refused. If the bucket still has the batch "
            "files, write it again; its content was %s",
            self._marker,
            identity,
        )

    def identity(self) -> str:
        """Kept in an object that only one gateway can create, by a conditional PUT (`If-None-Match: *`)."""
        try:
            return self._kept() or self._agreed()
        except FileNotFoundError:
            raise ValueError(f"the bucket of batch.files_url, {self.root}, does not exist") from None
        except self.refusals as error:
            raise ValueError(
                f"the object store refuses access to batch.files_url, {self.root}: {error}; see AWS_ACCESS_KEY_ID, "
                "AWS_SECRET_ACCESS_KEY and the bucket's policy"
            ) from None
        except Exception as error:  # noqa: BLE001 - as in _asked
            raise self._failure(error) from error

    def _kept(self) -> str | None:
        try:
            return cast(bytes, self.system.cat_file(self._marker)).decode()
        except FileNotFoundError:
            return None

    def _agreed(self) -> str:
        """Writes an identity, unless another gateway is first, and reads whose it is."""
        fresh = token_hex(16).encode()
        try:
            self.system.pipe_file(self._marker, fresh, mode="create")
        except OSError as error:  # S3's own codes for "it exists" differ between stores
            if error.errno == errno.ENOSYS:
                self.system.pipe_file(self._marker, fresh)  # a store without conditional PUT
            elif self._kept() is None:
                raise
        return cast(bytes, self.system.cat_file(self._marker)).decode()

    def _asked(self, ask: Callable[[], T]) -> T:
        try:
            answer = ask()
        except Exception as error:  # noqa: BLE001 - of s3fs, botocore, aiohttp: none can be mended here
            raise self._failure(error) from error
        self._failing = ""
        return answer

    def _failure(self, error: Exception) -> ServiceError:
        """What clients are told. The log has the rest, which is none of their business."""
        code = _code(error)
        if code != self._failing:
            log.warning("the object store fails on %s: %s: %s", self.root, code, error)
            self._failing = code
        if code in FULL or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
            return NoSpace("The object store is full: delete files that are no longer needed.", retry_after_s=60)
        if isinstance(error, self.refusals):
            return FilesUnavailable(f"The object store of batch files refuses access: {code}.", retry_after_s=60)
        retry_after_s = 60 if code == "NoSuchBucket" else 5
        return FilesUnavailable(
            f"The object store of batch files does not answer: {code}.", retry_after_s=retry_after_s
        )


def _code(error: BaseException) -> str:
    """S3's own code of an error, or the name of its class."""
    for each in (error, error.__cause__):
        response = getattr(each, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", type(error).__name__))
    return type(error).__name__


class _Object(io.RawIOBase):
    """An object as a file. read: the bytes from one offset to another. size: in bytes."""

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self._read = read
        self._size = size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._size)
        if end <= self._at:
            return 0
        data = self._read(self._at, end)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
