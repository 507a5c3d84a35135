"""Every knob of the gateway in one typed tree: command line > EVENHAND_… > YAML file > default."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    YamlConfigSettingsSource,
)

Positive = Annotated[float, Field(gt=0)]


LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]


class EdgeSettings(BaseModel):
    """What a client may send before it is refused."""

    model_config = ConfigDict(extra="forbid")

    max_head_bytes: int = Field(32 * 1024, ge=1024, description="request line and headers together, bytes")
    max_body_bytes: int = Field(32 * 1024 * 1024, ge=1024, description="request body, bytes")
    head_timeout_s: Positive = Field(15.0, description="until a connection's request head is complete, seconds")
    body_timeout_s: Positive = Field(60.0, description="until a request's body is complete, seconds")
    max_held_bytes: int = Field(
        512 * 1024 * 1024, ge=1024, description="all request bodies that arrive, wait or run, together, bytes"
    )
    max_connections: int | None = Field(
        None,
        ge=1,
        description="client connections of a process; default: as the limit of open files allows, at most 16384",
    )
    stall_timeout_s: Positive = Field(120.0, description="a client may read nothing of its answer, seconds")
    keep_alive_s: Positive = Field(75.0, description="an idle connection is kept open, seconds")
    gzip_from_bytes: int | None = Field(
        None, ge=64, description="whole JSON answers from this length on are compressed for clients that accept gzip"
    )
    address_rpm: int | None = Field(
        None, ge=1, description="requests a minute from one address, those with a wrong key too; beyond it 429"
    )

    @model_validator(mode="after")
    def _one_body_fits(self) -> Self:
        if self.max_held_bytes * 4 < self.max_body_bytes * 5:
            raise ValueError("max_held_bytes must be at least 5/4 of max_body_bytes, or the largest body never fits")
        return self


class AdmissionSettings(BaseModel):
    """Who waits, how long, and how far ahead of its batch an engine is filled."""

    model_config = ConfigDict(extra="forbid")

    max_waiting: int = Field(10_000, ge=0, description="requests that may wait per model; beyond it 429")
    queue_timeout_s: Positive | None = Field(600.0, description="longest wait for a worker, seconds")
    max_sequences: int = Field(128, ge=1, description="answers that one request may ask for: prompts times `n`")
    ahead: int | None = Field(
        None, ge=0, description="sequences given to a worker beyond its batch; default: the policy's choice"
    )


class DisaggregationSettings(BaseModel):
    """When a prompt is read by a prefill worker, where there are such; the rest goes straight to who answers it."""

    model_config = ConfigDict(extra="forbid")

    min_prompt_tokens: int = Field(
        128, ge=1, description="shorter prompts, what is cached left out, are read where they are answered"
    )
    busy_tokens: int = Field(8192, ge=1, description="a prefill worker with more pending is not waited for, tokens")
    max_arriving_tokens: int = Field(
        16384, ge=1, description="prompts whose KV is on its way to one decode worker, tokens"
    )
    balance_roles: bool = Field(False, description="workers of role `both` lean to the side that is short")
    prefill_timeout_s: Positive = Field(120.0, description="then the prompt is read where it is answered, seconds")


class SloTarget(BaseModel):
    """Objectives of one model's streams, in place of the general ones."""

    model_config = ConfigDict(extra="forbid")

    ttft_s: Positive | None = Field(None, description="from arrival to the first token, seconds")
    tpot_s: Positive | None = Field(None, description="mean time per later token, seconds")


class SloSettings(BaseModel):
    """What streams are promised: metrics and alerts judge by it, and placement keeps to it where it is set."""

    model_config = ConfigDict(extra="forbid")

    ttft_s: Positive | None = Field(
        None, description="objective for the first token, seconds; where it is not set, metrics and alerts take 2"
    )
    tpot_s: Positive | None = Field(
        None,
        description="objective for the mean time per later token, seconds; where it is not set, metrics and alerts "
        "take 0.1",
    )
    models: dict[str, SloTarget] = Field(
        default_factory=dict, description="objectives of single models by name, e.g. {large: {tpot_s: 0.05}}"
    )

    @property
    def named(self) -> bool:
        """Whether an objective is set for anything."""
        return bool(self.ttft_s or self.tpot_s or any(one.ttft_s or one.tpot_s for one in self.models.values()))


Money = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class ModelPrice(BaseModel):
    """Prices of a million tokens. cached: of prompt tokens that were in the prefix cache; default: as `input`."""

    model_config = ConfigDict(extra="forbid")

    input: Money = 0.0
    cached: Money | None = None
    output: Money = 0.0


class CostSettings(BaseModel):
    """What requests cost, in GPU time and in money."""

    model_config = ConfigDict(extra="forbid")

    meter: bool = Field(False, description="count GPU-seconds and money by tenant, model and tier, for /admin/usage")
    currency: str = Field("", max_length=16, description="a word beside every amount, e.g. EUR")
    gpu_hour: Money = Field(0.0, description="price of an hour of one GPU, for models without prices of their tokens")
    models: dict[str, ModelPrice] = Field(
        default_factory=dict, description="prices of a million tokens by the name that is asked; `*` is for all others"
    )


class HealthSettings(BaseModel):
    """When a worker is out, when it is back, and what happens to answers that it does not finish."""

    model_config = ConfigDict(extra="forbid")

    attempts: int = Field(3, ge=1, le=10, description="workers asked for one request, one after the other")
    probe_timeout_s: Positive = Field(5.0, description="a worker may take to answer a probe, seconds")
    failures: int = Field(5, ge=1, description="failed requests in a row after which a worker is out for a while")
    stall_s: Positive = Field(60.0, description="a stream may be silent while its engine makes no tokens, seconds")
    drain_s: Positive = Field(300.0, description="running streams may stay at a drained worker, seconds")
    canary: Literal["off", "answers", "same"] = Field(
        "answers", description="what a worker must answer to a trial question before it gets requests"
    )


class RecordSettings(BaseModel):
    """The traffic as a trace without content, for `evenhand replay`."""

    model_config = ConfigDict(extra="forbid")

    folder: Path | None = Field(None, description="folder for the trace's files; default: nothing is recorded")
    max_bytes: int = Field(1024**3, ge=1024**2, description="of all files together; the oldest is removed")
    file_bytes: int = Field(64 * 1024**2, ge=1024, description="of one file")


class TierSettings(BaseModel):
    """Service tiers: requests that go first, and requests that run in what others leave."""

    model_config = ConfigDict(extra="forbid")

    flex_cost: float = Field(
        0.5, ge=0, description="what a token of tier flex counts for in limits and budgets, and its price"
    )
    priority_cost: float = Field(2.0, ge=0, description="what a token of tier priority counts for")
    flex_timeout_s: Positive = Field(600.0, description="longest wait of a flex request for its start, seconds")
    flex_reserve: float = Field(
        0.05, ge=0, lt=1, description="of the starts while flex requests wait, their share when others want all"
    )
    flex_share: float = Field(
        0.25, gt=0, le=1, description="of the slots of a worker without our scheduler, most for flex requests"
    )


class BatchSettings(BaseModel):
    """OpenAI's Batch API: files of requests that run as tier flex."""

    model_config = ConfigDict(extra="forbid")

    folder: Path | None = Field(None, description="folder for files and batches; default: no Batch API")
    shared: bool = Field(
        False,
        description="several gateways run the same batches: in Redis, with a folder that all of them share",
    )
    max_requests: int = Field(50_000, ge=1, description="requests of one batch")
    tenant_bytes: int = Field(10 * 1024**3, ge=1, description="of all files of one tenant, bytes")
    keep_days: Positive = Field(30.0, description="then a file is removed, days")


class SleepSettings(BaseModel):
    """Models that nobody asks for."""

    model_config = ConfigDict(extra="forbid")

    after_s: Positive | None = Field(
        None, description="a model without traffic for so long is put to sleep, seconds; default: none is"
    )
    level: Literal[1, 2] = Field(
        1, description="of vLLM's sleep mode: 1 keeps the weights in the machine's memory, 2 loads them anew"
    )
    max_wait_s: Positive = Field(300.0, description="a request may wait for a model to wake up, seconds")
    from_zero: list[str] = Field(
        default_factory=list,
        description="a model that is started elsewhere when requests wait for it: they wait, though nobody serves it",
    )


class TracingSettings(BaseModel):
    """One OpenTelemetry trace per request."""

    model_config = ConfigDict(extra="forbid")

    endpoint: str | None = Field(
        None, pattern="^https?://", description="where spans go, OTLP over HTTP, e.g. http://127.0.0.1:4318/v1/traces"
    )
    share: float = Field(1.0, ge=0, le=1, description="of the requests that no caller has decided about")


class Settings(BaseSettings):
    """The gateway's settings."""

    model_config = SettingsConfigDict(
        env_prefix="EVENHAND_", env_nested_delimiter="__", extra="forbid", nested_model_default_partial_update=True
    )

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on")
    tls_cert: Path | None = Field(
        None, description="PEM file of the certificate that clients see; read again when it is renewed"
    )
    tls_key: Path | None = Field(None, description="PEM file of its key, if that is not in the same file")
    cors_origins: list[str] = Field(
        default_factory=list, description="a web site whose pages may ask this gateway, e.g. https://chat.example, or *"
    )
    trusted_proxies: list[str] = Field(
        default_factory=list,
        description="address or network of a proxy whose Forwarded and X-Forwarded-For headers count, e.g. 10.0.0.0/8",
    )
    policy: str = Field("fcfs", description="order of the queue: fcfs, mlfq, vtc, gittins or srpt")
    policy_options: dict[str, str] = Field(default_factory=dict, description="an option of the policy")
    workers: list[str] = Field(
        default_factory=list,
        description="an OpenAI-compatible engine, e.g. http://127.0.0.1:8101,slots=256, or https://host,key=ENV_NAME,ca=FILE",
    )
    models: dict[str, Any] = Field(
        default_factory=dict,
        description="a name that clients may ask for and the model that answers, e.g. gpt-4o-mini=smollm2; "
        "`*` stands for every name that nobody serves",
    )
    worker_ca: Path | None = Field(
        None, description="PEM file of who signs the certificates of workers that name no `ca` of their own"
    )
    worker_cert: Path | None = Field(
        None, description="PEM file of the gateway's own certificate, for workers that ask for one"
    )
    worker_cert_key: Path | None = Field(None, description="PEM file of its key, if that is not in the same file")
    gateway_processes: int = Field(1, ge=1, le=64, description="processes that are this gateway, behind one port")
    probe_s: Positive = Field(1.0, description="between two probes of a worker, seconds")
    lame_duck_s: float = Field(
        0.0, ge=0, description="after a stop signal /ready says 503 and requests are still taken, seconds"
    )
    shutdown_s: Positive = Field(30.0, description="running answers may finish after a stop signal, seconds")
    tenants: Path | None = Field(
        None, description="YAML file with the tenants, their keys and limits; read anew when it changes"
    )
    allow_open: bool = Field(
        False, description="serve without any tenant on an address that others can reach: anybody may ask"
    )
    admin_key: SecretStr | None = Field(None, min_length=16, description="opens /admin; without one /admin refuses")
    admin_host: str = Field("127.0.0.1", description="address for /admin and the console, once there is an admin key")
    admin_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="their port; default: 1000 above `port`; the same as `port`: no address of their own",
    )
    redis_url: SecretStr | None = Field(
        None,
        description="Redis that replicas share, e.g. redis://HOST:6379/0; set EVENHAND_REDIS_URL if it has a password",
    )
    replica: str = Field("", max_length=64, description="this gateway's name among its replicas; default: the host's")
    sync_s: Positive = Field(0.1, le=5.0, description="between two exchanges with the replicas, seconds")
    salt_cache: bool = Field(
        False, description="a prefix cache of its own for each tenant: none learns from time what another has asked"
    )
    tenant_labels: int = Field(20, ge=1, le=1000, description="tenants named in metrics; the rest is `other`")
    log_format: LogFormat = Field("text", description="of the gateway's log: text, or json with a line per request")
    log_level: LogLevel = Field("info", description="from which level on the gateway's log speaks")
    edge: EdgeSettings = EdgeSettings()
    admission: AdmissionSettings = AdmissionSettings()
    record: RecordSettings = RecordSettings()
    tiers: TierSettings = TierSettings()
    batch: BatchSettings = BatchSettings()
    tracing: TracingSettings = TracingSettings()
    sleep: SleepSettings = SleepSettings()
    disaggregation: DisaggregationSettings = DisaggregationSettings()
    slo: SloSettings = SloSettings()
    health: HealthSettings = HealthSettings()
    cost: CostSettings = CostSettings()


def scheme_of(settings: Settings) -> str:
    """What clients write before the gateway's address."""
    return "http" if settings.tls_cert is None else "https"


ADMIN_ABOVE = 1000  # so much above the public port, unless that is too high


def admin_address(settings: Settings, port: int) -> tuple[str, int] | None:
    """Where /admin and the console are, for a gateway that listens on `port`; None for no address of their own."""
    if settings.admin_key is None or settings.admin_port == settings.port:
        return None
    above = port + ADMIN_ABOVE if port + ADMIN_ABOVE <= 65535 else port - ADMIN_ABOVE
    return settings.admin_host, above if settings.admin_port is None else settings.admin_port


Read = TypeVar("Read", bound=Settings)


def read_settings(overrides: dict[str, Any], config: Path | None, kind: type[Read]) -> Read:
    """The settings, of this kind, with what the command line said. ValueError with a sentence for each wrong one."""
    if config is not None:
        _check_file(config)

    class FromFile(kind):  # type: ignore[misc, valid-type]  # a class made for this one file
        @classmethod
        def settings_customise_sources(  # noqa: PLR0913 - pydantic's own signature
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            file = YamlConfigSettingsSource(settings_cls, yaml_file=config)
            return init_settings, env_settings, file

    try:
        read: Read = FromFile(**overrides)
        return read
    except SettingsError as error:
        raise ValueError(f"{error}: write lists and mappings in the environment as JSON") from None
    except ValidationError as error:
        raise ValueError("\n".join(_sentence(dict(problem)) for problem in error.errors())) from None


def whence(settings: Settings, overrides: Mapping[str, Any], config: Path | None) -> str:
    """Each option of the policy and its place: `within=gittins (gateway.yaml), levels=4 (command line)`.

    They are put together from all places, so that one of them can be from where nobody looks.
    """
    line = overrides.get("policy_options", {})
    environment = EnvSettingsSource(type(settings))().get("policy_options", {})

    def place(name: str) -> str:
        if name in line:
            return "command line"
        return "EVENHAND_POLICY_OPTIONS" if name in environment else str(config)

    return ", ".join(f"{name}={value} ({place(name)})" for name, value in settings.policy_options.items())


def _check_file(config: Path) -> None:
    """ValueError unless the file is there and holds a mapping."""
    if not config.is_file():
        raise ValueError(f"the settings file {config} does not exist")
    try:
        content = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"the settings file {config} is not YAML: {' '.join(str(error).split())}") from None
    if content is not None and not isinstance(content, dict):
        raise ValueError(f"the settings file {config} holds no settings: write each as `name: value`")


def _sentence(problem: dict[str, Any]) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    if name in ("admin_key", "redis_url", "engine_key"):
        return f"setting {name!r}: {problem['msg']}"
    return f"setting {name!r}: {problem['msg']} (got {problem.get('input')!r})"
