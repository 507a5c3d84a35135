"""`evenhand serve --dry-run`: which engine would run where and with which command line; it starts nothing."""

import shlex
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from deploy.engine.engine_args import KEY_NAME, EngineCommand
from deploy.engine.worker import usable_ports
from deploy.model.model import ENGINE_ARGS, MADE_HERE, ModelSource, cache_folder, is_complete, resolve
from deploy.serve.preflight import check_all, driver_remarks, gpu_plan, in_words, plan_workers
from deploy.serve.serving import Surroundings, check_names, shown_source
from deploy.settings import ServeSettings


def dry_run(settings: ServeSettings, around: Surroundings, console: Console) -> int:
    """Prints the plan; returns the exit code. Raises what a start would raise before its first engine."""
    machine = around.machine()
    checked = check_all(settings, machine, cache_folder(), around.ask, around.weigh)
    found = [_source(one.name) for one in settings.model]
    sources, remarks = [source for source, _ in found], [remark for _, remarks in found for remark in remarks]
    check_names(settings, [source.served_name for source in sources])
    plans = plan_workers(settings, machine, checked, sources)
    engine = machine.engine
    rows = {
        "model" if len(sources) == 1 else "models": ", ".join(map(shown_source, sources)),
        "engine": f"vLLM {engine.version} ({engine.build})" if engine else "",
        **{name: in_words(plan) for name, plan in plans.items()},
    }
    width = max(map(len, rows)) + 2
    for name, value in rows.items():
        console.print(Text.assemble((f"  {name:<{width}}", "dim"), value), soft_wrap=True)
    for remark in (*remarks, *driver_remarks(machine), *gpu_plan(settings, machine, checked).remarks):
        console.print(Text.assemble((f"  {'note':<{width}}", "dim"), (remark, "yellow")), soft_wrap=True)
    for name, plan in plans.items():
        command = around.command(plan, usable_ports(None), sys.executable)
        console.print(Text(f"\n# {name} at {command.url}; port and key change with each start", "dim"), soft_wrap=True)
        console.print(Text(" \\\n  ".join(_lines(command))), soft_wrap=True)
    return 0


def _lines(command: EngineCommand) -> Sequence[str]:
    """The command for a shell: variables, the program, and each of its options with its values on a line."""
    shown = dict(command.env) | ({KEY_NAME: "…"} if KEY_NAME in command.env else {})
    lines = [f"{key}={shlex.quote(value)}" for key, value in sorted(shown.items())]
    program = command.argv.index("-m") + 2 if "-m" in command.argv else 1
    lines.append(shlex.join(command.argv[:program]))
    for word in command.argv[program:]:
        if word.startswith("-"):
            lines.append(shlex.quote(word))
        else:
            lines[-1] += f" {shlex.quote(word)}"
    return lines


def _source(name: str) -> tuple[ModelSource, list[str]]:
    """The model, as if it had been prepared, and what would be done for it first."""
    cache = cache_folder()
    if name in MADE_HERE and not is_complete(cache / name):
        return ModelSource(str(cache / name), name, ENGINE_ARGS[name]), [f"{name} would be prepared in {cache} first"]
    return resolve(name, cache), []
