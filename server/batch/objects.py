"""Files and batches as data, in the shapes of OpenAI's API."""

from enum import StrEnum
from typing import Any

import msgspec


class Status(StrEnum):
    """The life of a batch. `NEXT` names every transition."""

    VALIDATING = "validating"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    FAILED = "failed"  # its input is wrong: nothing of it ran
    EXPIRED = "expired"  # its window ended first: what had run by then is in its output
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


NEXT: dict[Status, frozenset[Status]] = {
    Status.VALIDATING: frozenset({Status.IN_PROGRESS, Status.FAILED, Status.CANCELLING, Status.EXPIRED}),
    Status.IN_PROGRESS: frozenset({Status.FINALIZING, Status.CANCELLING, Status.EXPIRED}),
    Status.FINALIZING: frozenset({Status.COMPLETED}),
    Status.CANCELLING: frozenset({Status.CANCELLED}),
    Status.COMPLETED: frozenset(),
    Status.FAILED: frozenset(),
    Status.EXPIRED: frozenset(),
    Status.CANCELLED: frozenset(),
}
RUNNING = tuple(status for status, following in NEXT.items() if following)


class StoredFile(msgspec.Struct, frozen=True):
    """A file's record; its content is elsewhere: `files.Files`. Times are in seconds since 1970."""

    id: str
    tenant: str
    filename: str
    purpose: str
    bytes: int
    created_at: int
    expires_at: int

    def public(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


class LineError(msgspec.Struct, frozen=True):
    """What is wrong with a line of an input file. line: counted from 1; None if it is the whole file."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class Batch(msgspec.Struct, frozen=True):
    """A batch's record. Times are in seconds since 1970, None if not reached.

    times: when each status was reached. total, completed, failed: lines in all, answered, and answered with an error.
    """

    id: str
    tenant: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    expires_at: int
    status: Status = Status.VALIDATING
    times: dict[str, int] = {}
    total: int = 0
    completed: int = 0
    failed: int = 0
    output_file_id: str | None = None
    error_file_id: str | None = None
    errors: tuple[LineError, ...] = ()
    metadata: dict[str, str] | None = None

    def moved(self, status: Status, now: int, **changes: Any) -> "Batch":
        """The batch in its next status. ValueError for a transition that `NEXT` does not have."""
        if status not in NEXT[self.status]:
            raise ValueError(f"a batch cannot go from {self.status} to {status}")
        return msgspec.structs.replace(self, status=status, times=self.times | {status: now}, **changes)

    def public(self) -> dict[str, Any]:
        reached = {f"{status}_at": self.times.get(status) for status in Status if status is not Status.VALIDATING}
        errors = [msgspec.to_builtins(error) for error in self.errors]
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": {"object": "list", "data": errors} if errors else None,
            "input_file_id": self.input_file_id,
            "completion_window": self.completion_window,
            "status": self.status.value,
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            **reached,
            "request_counts": {"total": self.total, "completed": self.completed, "failed": self.failed},
            "metadata": self.metadata,
        }


class BatchLine(msgspec.Struct, frozen=True):
    """Where a request stands in the input file. number: from 1. offset, length: bytes."""

    number: int
    custom_id: str
    offset: int
    length: int


class Result(msgspec.Struct, frozen=True):
    """A request's answer. ok: it goes to the output file, else to the error file. text: its line there."""

    number: int
    ok: bool
    text: bytes
