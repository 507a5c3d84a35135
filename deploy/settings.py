"""The settings of `evenhand serve`: the gateway's, and what its local engines need."""

import json
import re
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, field_validator
from pydantic_settings import NoDecode

from deploy.model.model import BUNDLED
from server.settings import Positive, Settings

_LABEL = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,40}$"
_OF_ONE_MODEL = re.compile(r"([^-].*?):(-.*)")  # an engine argument with a model's name before it


class ModelSettings(BaseModel):
    """One model that is served, and what holds for its engines alone; None for what holds for all."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, description="a bundled model, a folder, or a Hugging Face id")
    label: str | None = Field(None, pattern=_LABEL, description="prefix of its workers' names")
    workers: int | None = Field(None, ge=0, le=64)
    prefill_workers: int | None = Field(None, ge=0, le=64)
    decode_workers: int | None = Field(None, ge=0, le=64)
    kv_cache_gib: int | None = Field(None, ge=1)
    gpus: str | None = None
    engine_args: list[str] = Field(
        default_factory=list, description="engine arguments, appended to those of all models"
    )

    @field_validator("gpus", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        """A number, or several with `+` between them where a comma has another meaning."""
        return str(value).replace("+", ",") if isinstance(value, int | str) else value


def _models(value: object) -> object:
    """One model, or a list of them, in the environment as JSON; each a mapping, or a text `NAME[,workers=N]…`."""
    if isinstance(value, str) and value.startswith("["):
        value = json.loads(value)
    given = value if isinstance(value, list) else [value]
    return [_model(one) if isinstance(one, str) else one for one in given]


def _model(text: str) -> dict[str, Any]:
    name, *pairs = text.split(",")
    told: dict[str, Any] = {"name": name}
    for pair in pairs:
        key, equals, what = pair.partition("=")
        if not equals:
            raise ValueError(f"model {text!r}: write it as NAME[,workers=N][,gpus=0+1]")
        told[key] = what
    return told


class ServeSettings(Settings):
    """A gateway and engines on one machine."""

    model: Annotated[list[ModelSettings], NoDecode, BeforeValidator(_models)] = Field(
        default_factory=lambda: [ModelSettings(name=BUNDLED)],
        min_length=1,
        description=f"model to serve: a bundled model, a folder, or a Hugging Face id; default: {BUNDLED}",
    )
    worker_count: int | None = Field(
        None, ge=0, le=64, description="engines that do prefill and decode; default: 1, or 0 with the two kinds below"
    )
    prefill_workers: int = Field(0, ge=0, le=64, description="engines for prefill only")
    decode_workers: int = Field(
        0, ge=0, le=64, description="engines that decode what the prefill engines have computed"
    )
    kv_cache_gib: int | None = Field(
        None, ge=1, description="KV cache of each CPU engine, GiB; default: by free memory"
    )
    engine_args: list[str] = Field(
        default_factory=list,
        description="an argument passed to vLLM unchanged, e.g. --engine-arg=--max-num-seqs=8; it overrides ours. "
        "--engine-arg=NAME:--max-num-seqs=8 applies to the engines of one model",
    )
    engine_key: SecretStr | None = Field(
        None,
        min_length=16,
        description="API key of the engines, so that nobody can bypass the gateway; default: a random key for each",
    )
    gpus: str = Field(
        "", description="GPUs to use, as indices or UUIDs: 0,1; default: all visible GPUs that are not in use"
    )
    compile: bool = Field(
        False,
        description="compile the model at start: on a CPU it is ready 40 s later and produces about a seventh more "
        "tokens per second (GPU engines always compile)",
    )
    start_timeout_s: Positive = Field(900.0, description="longest silence in the log of a starting engine, seconds")
    state_folder: Path | None = Field(
        None, description="folder for the engines' logs; default: the user's state folder"
    )
    dry_run: bool = Field(False, description="print what would be started on which GPUs or cores, without starting it")
    verbose: bool = Field(False, description="show the engines' complete logs")

    @property
    def source(self) -> str:
        """The model, where there is one."""
        return self.model[0].name

    def each(self) -> list[Self]:
        """These settings for each model by itself. ValueError for one that comes twice, or an argument of none."""
        names = [one.name for one in self.model]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"the model {twice!r} is given twice: write --model {twice},workers=2 for more engines")
        for arg in self.engine_args:
            found = _OF_ONE_MODEL.fullmatch(arg)
            if found is not None and found.group(1) not in names:
                raise ValueError(f"--engine-arg={arg}: there is no --model {found.group(1)}")
        labels = _labels(self.model)
        return [self._only(one, label) for one, label in zip(self.model, labels, strict=True)]

    def _only(self, one: ModelSettings, label: str) -> Self:
        own = {
            "worker_count": one.workers,
            "prefill_workers": one.prefill_workers,
            "decode_workers": one.decode_workers,
            "kv_cache_gib": one.kv_cache_gib,
            "gpus": one.gpus,
        }
        args = [arg for given in self.engine_args if (arg := _for_model(given, one.name))]
        changes: dict[str, Any] = {name: value for name, value in own.items() if value is not None}
        changes["model"] = [one.model_copy(update={"label": label})]
        return self.model_copy(update=changes | {"engine_args": [*args, *one.engine_args]})


def _for_model(arg: str, name: str) -> str:
    """An engine argument as this model's engines get it, "" for one that is another's."""
    found = _OF_ONE_MODEL.fullmatch(arg)
    if found is None:
        return arg
    return found.group(2) if found.group(1) == name else ""


def _labels(models: list[ModelSettings]) -> list[str]:
    """What each model's workers are called after: nothing where there is one model, else the end of its name."""
    if len(models) == 1:
        return [models[0].label or ""]
    labels: list[str] = []
    for one in models:
        end = re.sub(r"[^A-Za-z0-9._-]+", "-", one.name.rstrip("/").rpartition("/")[2]).strip("-._")[:40].lower()
        label = one.label or end or "model"
        labels.append(label if label not in labels else f"{label}-{len(labels)}")
    return labels
