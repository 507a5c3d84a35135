"""A program of supervised processes, for tests: `python -m tests.server.supervised FOLDER [BEHAVIOUR]`.

Each process writes FOLDER/NAME.pid, then does what BEHAVIOUR says of it; all end when they are told.
"""

import os
import sys
import time
from functools import partial
from pathlib import Path

from server.processes.supervisor import Post, Program, Supervisor


def obey(folder: Path, name: str, behaviour: str, post: Post) -> int:
    """Runs until it is told to stop; writes what it was told."""
    if behaviour == "never starts" and name == "b":
        return 3
    if behaviour == "raises" and name == "b":
        raise ValueError("this cannot be")
    whole = folder / f"{name}.pid.{os.getpid()}"
    whole.write_text(str(os.getpid()))
    whole.rename(folder / f"{name}.pid")  # whoever looks sees the old number or the new one
    post.ready()
    heard = b""
    while True:
        order = os.read(post.orders, 1)
        heard += order
        with (folder / "orders").open("ab") as file:
            file.write(f"{name}:{order.decode() or 'end'}\n".encode())
        if behaviour == "slow" and name == "a" and order == b"s":
            continue  # it has something to finish
        if behaviour == "deaf" and name == "a" and order:
            continue
        if behaviour == "fails at the end" and name == "a":
            return 5
        return 0


def main() -> int:
    folder, behaviour = Path(sys.argv[1]), " ".join(sys.argv[2:])
    programs = [
        Program(name, partial(obey, folder, name, behaviour), last=name == "last") for name in ("last", "a", "b")
    ]
    return Supervisor(
        programs,
        grace_s=-9.5 if behaviour == "deaf" else 60.0,  # KILL_S comes on top
        clock=time.monotonic,
        all_ready=lambda: (folder / "ready").touch(),
    ).run()


if __name__ == "__main__":
    sys.exit(main())
