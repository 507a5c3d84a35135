"""The exit codes of `evenhand serve` and `evenhand worker`, each with its reason."""

import signal
from collections.abc import Callable

from rich.console import Console

from deploy.engine.engine_args import EngineArgsError
from deploy.engine.worker import WorkerError
from deploy.machine.gpu_plan import GpuPlanError
from deploy.model.model import ModelError
from deploy.serve.preflight import PreflightError


def exit_code(command: str, serve: Callable[[], int]) -> int:
    """What `serve` returns. What cannot work is one red sentence and 1, settings that cannot be are 2."""
    complain = Console(stderr=True)
    try:
        return serve()
    except KeyboardInterrupt:  # before our own handler was in place
        return 128 + signal.SIGINT
    except (EngineArgsError, GpuPlanError, ModelError, PreflightError, WorkerError) as error:
        why, code = str(error), 1
    except ValueError as error:
        why, code = str(error), 2
    complain.print(f"{command}: {why}", style="red", markup=False, highlight=False, soft_wrap=True)
    return code
