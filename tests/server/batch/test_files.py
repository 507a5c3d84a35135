"""What every place for batch files must do, and what a bucket does beside that."""

import errno
import io
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from s3fs import S3FileSystem

from server.batch import object_files as objects
from server.batch.batches import Batches
from server.batch.files import FileFolder, Files, FilesUnavailable, NoSpace
from server.batch.object_files import object_files
from server.batch.store import SqliteBatchStore
from server.settings import BatchSettings
from tests.chaos.site import S3_ENVIRONMENT
from tests.server.batch.bucket import Bucket

ID = "file-00000001"
Reopen = Callable[[], Files]


@pytest.fixture(params=["folder", "bucket"])
def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> Reopen:
    """Opens the same files once more, as another gateway would."""
    if request.param == "folder":
        return lambda: FileFolder(tmp_path / "files")
    url = request.getfixturevalue("bucket").url
    return lambda: object_files(url)


@pytest.fixture
def files(reopen: Reopen) -> Files:
    files = reopen()
    files.identity()
    return files


def content(files: Files, file_id: str = ID) -> bytes:
    return b"".join(files.pieces(file_id))


def put(files: Files, data: bytes, file_id: str = ID) -> None:
    with files.writing(file_id) as file:
        file.write(data)


def test_a_content_is_there_only_once_it_is_whole_and_replaces_an_older_one(files: Files, reopen: Reopen) -> None:
    with pytest.raises(FileNotFoundError):
        content(files)
    with files.writing(ID) as file:
        file.write(b"ha")
        file.writelines([b"l", b"f"])
        with pytest.raises(FileNotFoundError):
            content(files)
    assert content(reopen()) == b"half"
    with files.writing(ID) as file:
        file.write(b"ot")
        assert content(files) == b"half"
        file.write(b"her")
    assert content(reopen()) == b"other"


def test_a_content_whose_writing_fails_leaves_nothing_behind(files: Files) -> None:
    put(files, b"kept", "file-00000002")
    for file_id in (ID, "file-00000002"):
        with pytest.raises(RuntimeError), files.writing(file_id) as file:
            file.write(b"x")
            raise RuntimeError("a defect")
    with pytest.raises(FileNotFoundError):
        content(files)
    assert content(files, "file-00000002") == b"kept"


def test_it_is_read_line_by_line_and_at_any_offset(files: Files) -> None:
    lines = [b"%06d " % number + b"x" * (number % 97) + b"\n" for number in range(40_000)]
    data = b"".join(lines)
    assert len(data) > 2 * objects.READ_BYTES
    put(files, data)
    with files.open(ID) as file:
        assert list(file) == lines
        assert file.read(1) == file.readline() == b""
        for offset, length in ((0, 7), (len(data) - 5, 5), (objects.READ_BYTES - 3, 6), (1_000_000, 70_000), (12, 0)):
            file.seek(offset)
            assert file.read(length) == data[offset : offset + length]
        file.seek(0)
        assert file.readline(4) == b"0000"
        file.seek(len(data) + 10)
        assert file.read(10) == b""


def test_an_empty_content_is_one(files: Files) -> None:
    put(files, b"")
    assert content(files) == b""


def test_what_is_removed_is_gone_and_may_be_removed_again(files: Files) -> None:
    put(files, b"x")
    for _ in range(2):
        files.remove(ID)
        with pytest.raises(FileNotFoundError):
            files.open(ID)


@pytest.mark.parametrize("name", ["../x", "file-../../etc", "file-\x00aaaaaaaa", "", "folder-id"])
def test_a_name_cannot_lead_out_of_the_place(files: Files, name: str) -> None:
    for use in (files.open, files.remove, lambda name: files.writing(name).__enter__()):
        with pytest.raises(ValueError, match="not a file id"):
            use(name)


def test_gateways_that_start_at_once_agree_on_the_identity(reopen: Reopen) -> None:
    every = [reopen() for _ in range(4)]
    begin, told = threading.Barrier(len(every)), []

    def ask(files: Files) -> None:
        begin.wait()
        told.append(files.identity())

    threads = [threading.Thread(target=ask, args=(files,)) for files in every]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told) == 4 and len(set(told)) == 1 and len(told[0]) == 32
    assert reopen().identity() == told[0]


def test_other_files_have_another_identity(bucket: Bucket, tmp_path: Path) -> None:
    places = [object_files(bucket.url), object_files(f"s3://{bucket.name}"), object_files(f"s3://{bucket.name}/a/b/")]
    folders = [FileFolder(tmp_path / name / "files") for name in "ab"]
    assert len({files.identity() for files in [*places, *folders]}) == 5


def test_parts_of_gateways_that_were_killed_are_removed(files: Files, request: pytest.FixtureRequest) -> None:
    put(files, b"kept")
    if isinstance(files, FileFolder):
        (files.folder / "file-00000002.12345678.part").write_bytes(b"half")
        left = lambda: [path.name for path in files.folder.glob("*.part")]  # noqa: E731
    else:
        bucket = request.getfixturevalue("bucket")
        for key in ("batches/file-00000002", "batches-of-others/file-00000002"):
            bucket.system.call_s3("create_multipart_upload", Bucket=bucket.name, Key=key)
        left = lambda: [key for key in bucket.uploads() if key.startswith("batches/")]  # noqa: E731
    files.remove_parts(0.0)
    assert len(left()) == 1
    files.remove_parts(2.0**33)
    assert not left() and content(files) == b"kept"
    if not isinstance(files, FileFolder):
        assert bucket.uploads() == ["batches-of-others/file-00000002"]


@pytest.mark.slow
def test_parts_that_another_gateway_has_removed_and_those_of_later_pages_are_no_problem(
    bucket: Bucket, caplog: pytest.LogCaptureFixture
) -> None:
    files, aborted = object_files(bucket.url), []
    for number in range(3):
        key = f"batches/file-0000000{number}"
        bucket.system.call_s3("create_multipart_upload", Bucket=bucket.name, Key=key)
    page = bucket.system.call_s3("list_multipart_uploads", Bucket=bucket.name)["Uploads"]

    def listed(method: str, *, KeyMarker: str = "", **_: str) -> dict[str, Any]:  # noqa: N803 - S3's own names
        """Pages of two, which moto does not have."""
        assert method == "list_multipart_uploads"
        rest = [upload for upload in page if upload["Key"] > KeyMarker]
        last = rest[:2][-1]
        after = {"NextKeyMarker": last["Key"], "NextUploadIdMarker": last["UploadId"]}
        return {"Uploads": rest[:2], "IsTruncated": len(rest) > 2} | after

    class Paged:
        call_s3 = staticmethod(listed)

        @staticmethod
        def abort_mpu(name: str, key: str, upload: str) -> None:
            aborted.append(key)
            bucket.system.abort_mpu(name, key, upload)

    bucket.system.abort_mpu(bucket.name, page[0]["Key"], page[0]["UploadId"])  # another gateway is first
    files.system = Paged
    files.remove_parts(2.0**33)
    assert len(aborted) == 3 and not bucket.uploads() and "object store fails" not in caplog.text


async def test_the_hourly_sweep_writes_the_identity_again_unless_it_is_gone(
    bucket: Bucket, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = SqliteBatchStore(tmp_path / "batches.sqlite", time.monotonic)
    batches = Batches(object_files(bucket.url), store, BatchSettings(), time.monotonic)
    batches.check_at_start()
    marker, written = f"{bucket.url}/folder-id", []
    before = bucket.system.cat_file(marker)

    def noted(method: str, path: str, query: str) -> None:
        if method == "PUT":
            written.append(path)

    bucket.server.fault = noted
    await batches.sweep()
    assert [path.rpartition("/")[2] for path in written] == ["folder-id"]
    assert bucket.system.cat_file(marker) == before and "is gone" not in caplog.text
    bucket.system.rm_file(marker)
    await batches.sweep()
    assert not bucket.system.exists(marker) and before.decode() in caplog.text
    batches.close()


def test_a_full_disk_is_told_and_leaves_nothing_behind(files: Files) -> None:
    with pytest.raises(NoSpace, match="is full"), files.writing(ID) as file:
        file.write(b"x")
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(FileNotFoundError):
        files.open(ID)


def test_a_folder_that_is_not_mounted_is_not_taken_for_deleted_files(tmp_path: Path) -> None:
    files = FileFolder(tmp_path / "batch" / "files")
    files.identity()
    (tmp_path / "batch").rename(tmp_path / "away")
    for use in (files.open, files.remove, lambda name: put(files, b"x", name)):
        with pytest.raises(FilesUnavailable, match="See that it is mounted"):
            use(ID)


def test_a_folder_that_fails_while_it_is_read_or_listed_is_unavailable(tmp_path: Path) -> None:
    files = FileFolder(tmp_path / "files")
    files.identity()
    files.path(ID).symlink_to("/proc/self/mem")  # it opens, and nothing can be read at its beginning: EIO
    with files.open(ID) as file, files.open(ID) as other:
        for read in (lambda: file.read(10), other.read, file.readline, lambda: content(files)):
            with pytest.raises(FilesUnavailable, match="cannot be used: Input/output error"):
                read()
    files.folder = tmp_path / ("x" * 300)
    with pytest.raises(FilesUnavailable, match="cannot be used: File name too long"):
        files.remove_parts(0.0)


# a bucket
async def test_a_full_bucket_is_relieved_of_files_past_their_expiry(bucket: Bucket, tmp_path: Path) -> None:
    now = [1000.0]
    store = SqliteBatchStore(tmp_path / "batches.sqlite", lambda: now[0])
    batches = Batches(object_files(bucket.url), store, BatchSettings(), lambda: now[0])
    batches.check_at_start()
    await batches.add_file("acme", "in.jsonl", "batch", io.BytesIO(b"{}\n"))
    bucket.server.fault = lambda method, path, query: FAULTS["full"][:2] if method == "PUT" else None
    now[0] += 31 * 86400.0
    assert list(bucket.objects())
    with pytest.raises(NoSpace):
        await batches.sweep()
    assert not list(bucket.objects()) and store.stored_bytes("acme") == 0
    assert await batches.list_files("acme", None, 10) == []
    batches.close()


@pytest.mark.slow
def test_a_large_content_goes_in_parts_and_appears_whole_or_not_at_all(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "PART_BYTES", 5 * 1024 * 1024)
    data, files = os.urandom(1024) * 11_500, object_files(bucket.url)
    files.identity()
    bucket.server.fault = lambda method, path, query: (
        ("500 Internal Server Error", "InternalError") if "partNumber=3" in query else None
    )
    with pytest.raises(FilesUnavailable, match="does not answer: InternalError"):
        put(files, data)
    assert not list(bucket.objects()) and not bucket.uploads()
    bucket.server.fault = lambda *_: None
    put(files, data)
    assert content(files) == data and not bucket.uploads()


FAULTS = {
    "full": ("507 Insufficient Storage", "XMinioStorageFull", NoSpace, "object store is full"),
    "quota": ("403 Forbidden", "QuotaExceeded", NoSpace, "object store is full"),
    "refused": ("403 Forbidden", "AccessDenied", FilesUnavailable, "refuses access: AccessDenied"),
    "broken": ("500 Internal Server Error", "InternalError", FilesUnavailable, "does not answer: InternalError"),
    "no bucket": ("404 Not Found", "NoSuchBucket", FilesUnavailable, "does not answer: NoSuchBucket"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_what_the_store_fails_with_is_told_without_secrets(
    bucket: Bucket, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    status, code, raised, said = FAULTS[kind]
    files = object_files(bucket.url)
    bucket.server.fault = lambda method, path, query: (status, code) if method == "PUT" else None
    with pytest.raises(raised, match=said):
        put(files, b"x")
    assert code in caplog.text and bucket.name in caplog.text
    assert not any(secret in caplog.text for secret in list(S3_ENVIRONMENT.values())[:2])


@pytest.mark.slow
def test_a_store_that_is_away_is_unavailable_and_comes_back(bucket: Bucket) -> None:
    files = object_files(bucket.url)
    put(files, b"x")
    bucket.server.stop()
    try:
        for use in (lambda: content(files), lambda: files.remove(ID), lambda: put(files, b"y"), files.identity):
            with pytest.raises(FilesUnavailable, match="does not answer: EndpointConnectionError"):
                use()
    finally:
        bucket.server.start()
    assert content(files) == b"x"


def test_nothing_is_collected_for_a_store_that_is_away(bucket: Bucket) -> None:
    files = object_files(bucket.url)
    bucket.server.fault = lambda method, path, query: ("403 Forbidden", "AccessDenied") if method == "HEAD" else None
    with pytest.raises(FilesUnavailable, match="refuses access"), files.writing(ID):
        pytest.fail("it was asked for the content")


def test_a_bucket_that_was_emptied_is_not_taken_for_deleted_files(bucket: Bucket) -> None:
    files = object_files(bucket.url)
    files.identity()
    bucket.system.rm(bucket.url, recursive=True)
    with pytest.raises(FilesUnavailable, match="not there, or was emptied"):
        files.open(ID)


@pytest.mark.parametrize(
    ("status", "code"), [("501 Not Implemented", "NotImplemented"), ("412 Precondition Failed", "PreconditionFailed")]
)
def test_gateways_agree_where_a_conditional_put_is_answered_otherwise(bucket: Bucket, status: str, code: str) -> None:
    """Some stores have none; others have an error of their own for an object that another gateway has just written."""
    files, asked = object_files(bucket.url), []

    def fault(method: str, path: str, query: str) -> tuple[str, str] | None:
        if method != "PUT" or asked:
            return None
        asked.append(path)
        if status.startswith("412"):
            bucket.system.pipe_file(f"{bucket.url}/folder-id", b"of another gateway")
        return status, code

    bucket.server.fault = fault
    told = files.identity()
    assert told == object_files(bucket.url).identity()
    assert asked and (told == "of another gateway") == status.startswith("412")


@pytest.mark.parametrize(
    "url",
    ["", "s3:", "s3://", "s3:///prefix", "bucket/prefix", "/folder", "file:///folder", "memory://x", "https://host/b",
     "s3://key:secret@bucket/prefix", "s3://bucket/prefix?versionId=1", "s3://[bucket"],
)  # fmt: skip
def test_a_wrong_url_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(ValueError, match="must be s3://BUCKET") as wrong:
        object_files(url)
    assert "secret" not in str(wrong.value)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(ValueError, match=r"pip install 'evenhand\[s3\]'"):
        object_files("s3://bucket")


@pytest.mark.slow
def test_a_bucket_that_is_not_there_or_refuses_us_stops_the_start(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        object_files("s3://no-such-bucket/x").identity()
    bucket.server.fault = lambda *_: ("403 Forbidden", "AccessDenied")
    with pytest.raises(ValueError, match="refuses access"):
        object_files(bucket.url).identity()
    bucket.server.fault = lambda *_: None
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    S3FileSystem.clear_instance_cache()
    with pytest.raises(ValueError, match="refuses access.*credentials"):
        object_files(bucket.url).identity()
    S3FileSystem.clear_instance_cache()
