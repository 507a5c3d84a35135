"""What `evenhand serve` and `evenhand worker` have in common: options that settings describe, and ends that say why."""

import argparse
import signal
from collections.abc import Callable

from rich.console import Console

from deploy.engine.engine_args import EngineArgsError
from deploy.engine.model import ModelError
from deploy.engine.worker import WorkerError
from deploy.serve.preflight import PreflightError
from deploy.settings import ServeSettings


def option(
    parser: argparse.ArgumentParser,
    of: tuple[type[ServeSettings], str],
    metavar: str,
    kind: Callable[[str], object] = str,
    *,
    flag: str | None = None,
) -> None:
    """Adds the option of one setting, with its description and default. flag: where it is not the setting's name."""
    settings, name = of
    field = settings.model_fields[name]
    default = "" if field.default in (None, "") else f" (default: {field.default})"
    flag = flag or "--" + name.replace("_", "-")
    parser.add_argument(flag, dest=name, metavar=metavar, type=kind, help=f"{field.description}{default}")


def exit_code(command: str, serve: Callable[[], int]) -> int:
    """What `serve` returns. What cannot work is one red sentence and 1, settings that cannot be are 2."""
    complain = Console(stderr=True)
    try:
        return serve()
    except KeyboardInterrupt:  # before our own handler was in place
        return 128 + signal.SIGINT
    except (EngineArgsError, ModelError, PreflightError, WorkerError) as error:
        why, code = str(error), 1
    except ValueError as error:
        why, code = str(error), 2
    complain.print(f"{command}: {why}", style="red", markup=False, highlight=False, soft_wrap=True)
    return code
