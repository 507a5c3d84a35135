"""Records of LoRA adapters: name, base model, path of the files, and the tenants that may use it."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from server.request.names import ANY, ModelName


class AdapterRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An adapter, as the settings file and `/admin/adapters` write it.

    model: the base model. path: a folder that the engines can read, or a hub id.
    tenants: who may ask for it, None for everybody. It says nothing about model names that point here.
    pinned: every worker of the model loads it as soon as it is ready, and keeps it.
    """

    model: ModelName
    path: Annotated[str, Meta(min_length=1, max_length=4096)]
    tenants: frozenset[str] | None = None
    pinned: bool = False

    def described(self) -> dict[str, Any]:
        """The record as JSON has it."""
        told: dict[str, Any] = msgspec.to_builtins(self)
        return told | {"tenants": None if self.tenants is None else sorted(self.tenants)}

    def visible_to(self, tenant: str) -> bool:
        """Whether this tenant may use it."""
        return self.tenants is None or tenant in self.tenants


def read_adapter(name: str, value: Any) -> AdapterRecord:
    """A record from parsed YAML or JSON, or from a text MODEL:PATH. ValueError with a sentence."""
    if not name or len(name) > 256 or name == ANY:
        raise ValueError(f"adapter {name[:100]!r}: its name needs 1 to 256 characters and cannot be '*'")
    if isinstance(value, str):
        model, colon, path = value.partition(":")
        if not colon:
            raise ValueError(f"adapter {name!r}: write it as {name}=MODEL:PATH")
        value = {"model": model, "path": path}
    if not isinstance(value, dict):
        raise ValueError(f"adapter {name!r}: write its model and path")
    try:
        record = msgspec.convert(value, AdapterRecord)
    except msgspec.ValidationError as error:
        said, _, where = str(error).partition(" - at `$.")
        place = f" {where.rstrip('`')}:" if where else ""
        raise ValueError(f"adapter {name!r}:{place} {said[:1].lower()}{said[1:]}") from None
    if record.model == name:
        raise ValueError(f"adapter {name!r}: it has the name of its own model")
    return record
