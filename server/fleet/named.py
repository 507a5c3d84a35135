"""Workers listed in the settings: `--worker URL[,role=…][,slots=N][,key=ENV_NAME][,ca=FILE]…`."""

import re
from collections.abc import Mapping

from scheduler.workers import Role, Worker
from server.engine.access import Access, ClientTls
from server.settings import Settings

_KEY = re.compile(r",key=[^,]*")
OPTIONS = ("role", "slots", "gpus", "id", "kv", "key", "ca", "cert", "cert_key")


def named_worker(text: str, number: int, environ: Mapping[str, str]) -> tuple[Worker, Access]:
    """The worker of one `--worker` option, and its key and certificates. ValueError says what is wrong."""
    url, *pairs = text.split(",")
    shown = _KEY.sub(",key=…", text)  # somebody may write the key itself there
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"worker {shown!r}: write it as http://HOST:PORT[,role=both][,slots=256], or with https://")
    options = dict(pair.partition("=")[::2] for pair in pairs)
    if unknown := set(options) - set(OPTIONS):
        there_are = f"{', '.join(OPTIONS[:-1])} and {OPTIONS[-1]}"
        raise ValueError(f"worker {shown!r}: unknown option {sorted(unknown)[0]!r}; there are {there_are}")
    roles = {role.value: role for role in Role}
    role, slots = options.get("role", "both"), options.get("slots", "256")
    if role not in roles:
        raise ValueError(f"worker {shown!r}: role must be prefill, decode or both, not {role!r}")
    if not slots.isdigit() or int(slots) < 1:
        raise ValueError(f"worker {shown!r}: slots must be the number of sequences in its batch, not {slots!r}")
    if not (gpus := options.get("gpus", "1")).isdigit() or int(gpus) < 1:
        raise ValueError(f"worker {shown!r}: gpus must be the number of its GPUs, not {gpus!r}")
    if options.get("kv", "no") not in ("yes", "no"):
        raise ValueError(f"worker {shown!r}: kv must be yes (its engine can transfer KV caches) or no")
    worker_id, kv = options.get("id", f"worker-{number}"), options.get("kv") == "yes"
    try:
        access = _access(url, options, environ)
    except ValueError as error:
        raise ValueError(f"worker {shown!r}: {error}") from None
    return Worker(worker_id, url.rstrip("/"), roles[role], int(slots), hands_over=kv, gpus=int(gpus)), access


def _access(url: str, options: Mapping[str, str], environ: Mapping[str, str]) -> Access:
    """A key is named by the variable that holds it: what is on a command line, everybody on the machine can read."""
    name = options.get("key")
    if name is not None and not environ.get(name):
        raise ValueError("key names the environment variable that holds the key, and there is none of that name")
    access = Access(
        key=environ[name] if name is not None else "",
        ca=options.get("ca", ""),
        cert=options.get("cert", ""),
        cert_key=options.get("cert_key", ""),
    )
    if access.for_tls and not url.startswith("https://"):
        raise ValueError("ca, cert and cert_key are for a URL that begins with https://")
    if access.for_tls:
        ClientTls(access)
    return access


def fleet_tls(settings: Settings) -> Access:
    """Certificates for workers that name none. ValueError for files that cannot be used."""
    files = (settings.worker_ca, settings.worker_cert, settings.worker_cert_key)
    try:
        access = Access("", *(str(file or "") for file in files))
        if access.for_tls:
            ClientTls(access)
    except ValueError as error:
        raise ValueError(f"settings worker_ca, worker_cert and worker_cert_key: {error}") from None
    return access


def key_names(workers: list[str]) -> set[str]:
    """The environment variables that hold workers' keys."""
    pairs = [pair.partition("=") for text in workers for pair in text.split(",")[1:]]
    return {value for name, _, value in pairs if name == "key"}
