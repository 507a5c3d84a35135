"""Prepares a model before its engines start, in a separate program that reports progress and can be stopped."""

import asyncio
import os
import sys
from collections.abc import Callable, Sequence

from deploy.engine.child import ChildEnded, running
from deploy.model.hub import fetched_here
from deploy.model.model import MADE_HERE, ModelError, ModelSource, cache_folder, is_at_hub, is_complete, resolve

# Nothing that it imports stays with the gateway.
PROGRAM = (
    "import argparse, sys; from deploy.model import model; parser = argparse.ArgumentParser(); "
    "model.add_arguments(parser); sys.exit(model.run(parser.parse_args()))"
)


async def prepared(name: str, engine_args: Sequence[str], grace_s: float, hear: Callable[[str], None]) -> ModelSource:
    """The model, made or fetched if it is not there yet. ModelError says why it cannot be had.

    engine_args: the user's. grace_s: what the program gets to end when it is stopped. hear: called with what it says.
    """
    cache = cache_folder()
    if name in MADE_HERE:
        if not is_complete(cache / name):
            await _told(["prepare", name, "--cache", str(cache)], grace_s, hear)
        return resolve(name, cache)
    source = resolve(name, cache)
    if is_at_hub(source) and fetched_here(engine_args):
        await _told(["download", name], grace_s, hear)
    return source


async def _told(words: Sequence[str], grace_s: float, hear: Callable[[str], None]) -> None:
    last = ""

    def keep(line: str) -> None:
        nonlocal last
        last = line.rstrip()
        hear(last)

    async with running((sys.executable, "-P", "-c", PROGRAM, *words), os.environ, grace_s, keep) as child:
        try:
            await child.or_end(asyncio.Event().wait())
        except ChildEnded as end:
            if end.exit_code != 0:
                why = last.removeprefix("evenhand: ") or f"`evenhand model {' '.join(words)}` failed without a message"
                raise ModelError(why) from None
