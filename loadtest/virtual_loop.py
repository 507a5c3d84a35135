"""An event loop for programs whose seconds need not pass."""

import asyncio
from typing import Any


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop whose seconds pass only while it would sleep, and then at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        select = self._selector.select  # type: ignore[attr-defined]

        def skip(timeout: float | None = None) -> Any:  # noqa: ANN401
            self.now += timeout or 0.0
            return select(0)

        self._selector.select = skip  # type: ignore[attr-defined]

    def time(self) -> float:
        return self.now
