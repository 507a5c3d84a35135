"""vLLM's log: writes it to a file, follows the stages of the start, and finds out why an engine died."""

import logging
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path

log = logging.getLogger("evenhand.engine")

MOST_BYTES = 32 * 1024**2

# "(EngineCore pid=6511) INFO 11-21 04:51:48 [core.py:133] text", of which every part before the text may be missing.
LINE = re.compile(
    r"^(?:\((?P<process>[\w-]+) pid=\d+\) ?)?"
    r"(?:(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d [\d:]+ \[[^\]]*\] ?)?"
    r"(?P<text>.*)$"
)

FIRST_STAGE = "importing the engine"
# In the order in which they come, some left out on some machines; a line of an earlier stage may come again later.
STAGES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(?!)"), FIRST_STAGE),
    (re.compile(r"non-default args: "), "reading the model's configuration"),
    (re.compile(r"Resolved architecture: "), "starting the engine's processes"),
    (re.compile(r"Initializing a V1 LLM engine"), "setting up the engine"),
    (re.compile(r"Starting to load model "), "loading the model"),
    (re.compile(r"(Explicitly|Auto) set \(|KV cache size: "), "reserving the KV cache"),
    (re.compile(r"^Warming up model|^Start compiling|Capturing CUDA graph|torch\.compile took"), "warming up"),
    (re.compile(r"init engine \(profile"), "starting its HTTP server"),
    (re.compile(r"Starting vLLM server on |Application startup complete"), "answering"),
)

# Said at every start, on every machine, and of no use to whoever runs it.
NOISE = re.compile(
    r"Found ulimit of|Enforce eager set|Inductor compilation was disabled|Triton is not installed|requires Triton|"
    r"is not found in LD_PRELOAD|OMP_NUM_THREADS|not public|libtcmalloc|libiomp|Enabled custom fusions|"
    r"Default vLLM sampling parameters have been overridden|Attempted to load weight \S+ with dtype|"
    r"Reset SSM cache type|Initializing KVConnectorBase|seed is set to"
)

# What vLLM says in its own terms, and what it means for whoever runs it.
REWORDED: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(r"Failed to create oneDNN linear"),
        "this CPU has no fast kernel for the number format in which the engine computes: answers take up to ten times "
        "as long. Leave --dtype out, or choose --engine-arg=--dtype=float32",
    ),
)


class LogFile(RotatingFileHandler):
    """An engine's log on disk: at `most_bytes` it becomes `NAME.1`, and a new one begins.

    A line that cannot be written, because the disk is full say, is dropped; the first failure is logged as a warning.
    """

    def __init__(self, path: Path, most_bytes: int = MOST_BYTES) -> None:
        super().__init__(path, maxBytes=most_bytes, backupCount=1, encoding="utf-8", delay=True, errors="replace")
        self.path = path
        self._has_failed = False

    def write(self, line: str) -> None:
        """Appends the line, which is on its way to the disk when this returns."""
        self.emit(logging.makeLogRecord({"msg": line}))

    def _open(self) -> TextIOWrapper:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return super()._open()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if not self._has_failed:
            self._has_failed = True
            log.warning("cannot write the engine's log %s: %s", self.path, sys.exc_info()[1])


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line: the process that wrote it and the level, each empty if the line does not say."""

    process: str
    level: str
    text: str


def parse(line: str) -> LogLine:
    found = LINE.match(line.rstrip("\r\n"))
    if found is None:
        return LogLine("", "", line)
    return LogLine(found["process"] or "", found["level"] or "", found["text"])


def stage(line: LogLine, reached: int = 0) -> int:
    """The stage (its place in STAGES) that a start is in after this line, having `reached` one before."""
    for place in range(reached + 1, len(STAGES)):
        if STAGES[place][0].search(line.text):
            return place
    return reached


def shown(line: LogLine) -> str:
    """What to show of a line: a warning's sentence, for a reader who does not know vLLM; "" for everything else."""
    if not _is_warning(line):
        return ""
    return next((sentence for pattern, sentence in REWORDED if pattern.search(line.text)), line.text)


def _is_warning(line: LogLine) -> bool:
    """Warnings and worse, without the stack that follows one."""
    is_warning = line.level in {"WARNING", "ERROR", "CRITICAL"}
    is_sentence = bool(line.text.strip()) and not line.text.startswith((" ", "Traceback", "\t"))
    return is_warning and is_sentence and not NOISE.search(line.text)


Cause = tuple[re.Pattern[str], Callable[[re.Match[str]], str]]

CAUSES: tuple[Cause, ...] = (
    (
        re.compile(r"^[\w. -]+: error: ((?:unrecognized|argument|the following|ambiguous).+)"),
        lambda found: f"vLLM refuses an engine argument ({found[1]}): correct the --engine-arg",
    ),
    (
        re.compile(r"reaper\.py: error: (.+)"),
        lambda found: f"the engine cannot be run: {found[1]}",
    ),
    (
        re.compile(r"less than requested memory for kv \(([\d.]+)[^)]*GiB\)"),
        lambda found: (
            f"not enough free memory for a KV cache of {found[1]} GiB: give less with --kv-cache-gib, use fewer "
            "workers, or free memory"
        ),
    ),
    (
        re.compile(r"([\d.]+) GiB KV cache is needed|No available memory for the cache blocks"),
        lambda _: (
            "the KV cache cannot hold one request of the model's full length: give more (on a CPU with "
            "--kv-cache-gib, on GPUs by spreading the model with --engine-arg=--tensor-parallel-size=2), or shorten it "
            "with --engine-arg=--max-model-len=2048"
        ),
    ),
    (
        re.compile(r"CUDA out of memory|OutOfMemoryError|Free memory on device"),
        lambda _: (
            "the GPU has too little free memory: stop the other programs that use it (`nvidia-smi`), spread "
            "the model over more GPUs with --engine-arg=--tensor-parallel-size=2, or use a smaller or quantized model"
        ),
    ),
    (
        re.compile(r"MemoryError|Cannot allocate memory|DefaultCPUAllocator: can't allocate|std::bad_alloc"),
        lambda _: (
            "the machine ran out of memory (not the GPU): use a smaller model, fewer workers or, on a CPU, a smaller "
            "--kv-cache-gib"
        ),
    ),
    (
        re.compile(r"Address already in use"),
        lambda _: "another program took its port during the start: try again",
    ),
    (
        re.compile(r"has model type `([^`]+)` but Transformers does not recognize"),
        lambda found: f"vLLM does not know models of type {found[1]!r}: choose another model",
    ),
    (
        re.compile(r"Model architectures \[([^\]]*)\].*(?:not supported|failed to be inspected)"),
        lambda found: f"vLLM does not support the model's architecture ({found[1]}): choose another model",
    ),
    (
        re.compile(r"Invalid repository ID or local directory specified: '([^']*)'"),
        lambda found: f"{found[1]} is neither a model folder (with a config.json) nor a model of the hub",
    ),
    (
        re.compile(
            r"LocalEntryNotFoundError|We couldn't connect to|outgoing traffic has been disabled|OfflineModeIsEnabled"
        ),
        lambda _: (
            "the model is not on this machine, and its hub cannot be reached: give --model the path of a "
            "folder, or download it first"
        ),
    ),
    (
        re.compile(r"(?:GatedRepoError|RepositoryNotFoundError|401 Client Error|404 Client Error)"),
        lambda _: "the model hub has no such model, or it needs a token (HF_TOKEN): check the name given to --model",
    ),
    (
        re.compile(r"(?:Cannot find any model weights|safetensors_rust\.SafetensorError|SafetensorError|header too)"),
        lambda _: "the model's weight files are missing or damaged: get the model folder again",
    ),
    (
        re.compile(r"^(?:ModuleNotFoundError|ImportError): (.+)"),
        lambda found: f"the engine's installation is incomplete ({found[1]}): run `make install`",
    ),
    (
        re.compile(r"No space left on device"),
        lambda _: "the disk, or the shared memory in /dev/shm, is full: free some space",
    ),
    (
        re.compile(r"^\s*Value error, (.+?)(?: \[type=.*)?$"),
        lambda found: f"vLLM refuses the configuration: {found[1].rstrip('.')}",
    ),
)

# The last line of a Python stack: "package.SomeError: what happened".
RAISED = re.compile(r"^(?:[\w.]+\.)?(\w*(?:Error|Exception|Interrupt)): (.+)$")
# Said by the processes that noticed a death, not by the one that died.
CORE_GONE = re.compile(r"engine core exited unexpectedly|Engine core proc \S+ died unexpectedly|WorkerProc.* died")
ECHOES = re.compile(
    r"Engine core initialization failed|EngineDeadError|Executor failed|WorkerProc initialization failed"
)


def cause(lines: Sequence[str], exit_code: int | None) -> str:
    """One sentence on why the engine ended, by its last lines and exit code (None if it still runs), and what to do."""
    texts = [parse(line).text for line in lines]
    for pattern, sentence in CAUSES:
        for text in texts:
            if found := pattern.search(text):
                return sentence(found)
    raised = [found for text in texts if (found := RAISED.match(text.strip())) and not ECHOES.search(text)]
    if raised:
        return f"it failed with {raised[0][1]}: {shortened(raised[0][2])}"
    if exit_code == 137 or any(CORE_GONE.search(text) for text in texts):
        return "one of its processes was killed, usually because the system ran out of memory"
    return f"it ended with exit code {exit_code}" if exit_code is not None else "it stopped answering"


def shortened(text: str, most: int = 200) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"
