"""The places that batch files may be kept in."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.site import S3_ENVIRONMENT
from tests.server.batch.bucket import Bucket, S3Server


@dataclass
class Place:
    """settings: `batch` of a gateway. contents: names of the files that it keeps there."""

    settings: dict[str, Any]
    contents: Callable[[], list[str]]


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.stop()


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A bucket, and the environment through which the gateway reaches it."""
    for name, value in (S3_ENVIRONMENT | {"AWS_ENDPOINT_URL": s3_server.endpoint}).items():
        monkeypatch.setenv(name, value)
    yield Bucket(s3_server)
    s3_server.fault = lambda *_: None


@pytest.fixture(params=["folder", pytest.param("bucket", marks=pytest.mark.slow)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Where a gateway keeps batch files: what a client sees must be the same."""
    if request.param == "folder":
        return Place({"folder": tmp_path}, lambda: [path.name for path in (tmp_path / "files").iterdir()])
    bucket: Bucket = request.getfixturevalue("bucket")
    return Place({"folder": tmp_path, "files_url": bucket.url}, lambda: list(bucket.objects()))
