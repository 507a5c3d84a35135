"""The reservations of a split request at its prefill worker and at its decode worker."""

from collections.abc import Callable
from dataclasses import dataclass

from server.fleet.fleet import Member


@dataclass(slots=True, eq=False)
class Split:
    """One worker reads the prompt, another writes the answer: what the request holds at both.

    prompt_tokens: what it counts for. wake: called when it holds less, so that others may be let in.
    kv: where the prompt's KV can be fetched, in the prefill worker's own words; it can be fetched once.
    read_at: when that was told, in seconds on the gateway's clock; None as long as it was not.
    reading: it has a place on the prefill worker. arriving: its prompt is read, and its KV has not reached the decode
    worker. What is still being read does not count as arriving: it holds no decode worker up, and a bound on it would
    leave prefill workers idle.
    """

    prefill: Member
    decode: Member
    prompt_tokens: int
    wake: Callable[[], None]
    kv: bytes = b""
    read_at: float | None = None
    reading: bool = True
    arriving: bool = False

    def __post_init__(self) -> None:
        self.prefill.load.reserve(1, self.prompt_tokens)

    def read(self) -> None:
        """The prefill worker has nothing more to do for it."""
        if self.reading:
            self.reading = False
            self.prefill.load.release(1, self.prompt_tokens)
            if self.kv:
                self.arriving = True
                self.decode.load.expect(self.prompt_tokens)
            self.wake()

    def arrived(self) -> None:
        """The decode worker has its KV, or will do without."""
        if self.arriving:
            self.arriving = False
            self.decode.load.expect(-self.prompt_tokens)
            self.wake()

    def over(self) -> None:
        """Gives back whatever it still holds, and wakes nobody."""
        self.wake = _nobody
        self.read()
        self.arrived()

    def fetch(self, worker_id: str) -> bytes:
        """Where this worker can fetch the KV; nothing if it is not the one, or the second time."""
        if worker_id != self.decode.worker.id:
            return b""
        kv, self.kv = self.kv, b""
        return kv


def _nobody() -> None:
    return
