"""`python -m server`, which on SIGUSR1 writes its asyncio tasks to the file `EVENHAND_TASKS_FILE`, counted by what runs
in them."""

import asyncio
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from types import FrameType

from server.__main__ import main


def tell(number: int, frame: FrameType | None) -> None:
    tasks = (task.get_coro() for task in asyncio.all_tasks())
    counts = Counter(getattr(running, "__qualname__", repr(running)) for running in tasks)
    told = Path(os.environ["EVENHAND_TASKS_FILE"])
    written = told.with_suffix(".new")
    written.write_text(json.dumps(counts))
    written.replace(told)  # whoever waits for it reads all of it


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, tell)
    sys.exit(main())
