"""All settings of the gateway in one typed tree: command line > EVENHAND_… > YAML file > default."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    YamlConfigSettingsSource,
)

from server.interrupts import ended_by_ctrl_c

Positive = Annotated[float, Field(gt=0)]


def _addresses(value: Any) -> Any:
    """A list of addresses, from one, a list, or a JSON list, as lists are written in the environment."""
    if value is None:
        return []
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError("it begins as a JSON list does, and is none") from None
    addresses = [value] if isinstance(value, str) else value
    if isinstance(addresses, list) and any(isinstance(one, str) and one.count("://") > 1 for one in addresses):
        raise ValueError(
            "an option names one address, and may be repeated; a setting names several in a list: "
            '["redis://ONE:6379/0", "redis://OTHER:6379/0"]'
        )
    return addresses


RedisUrls = Annotated[list[SecretStr], NoDecode, BeforeValidator(_addresses)]
LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]


class EdgeSettings(BaseModel):
    """What a client may send before it is refused."""

    model_config = ConfigDict(extra="forbid")

    max_head_bytes: int = Field(32 * 1024, ge=1024, description="largest request line with headers, bytes")
    max_body_bytes: int = Field(32 * 1024 * 1024, ge=1024, description="largest request body, bytes")
    head_timeout_s: Positive = Field(
        15.0, description="time for a client to send the request line and headers, seconds"
    )
    body_timeout_s: Positive = Field(60.0, description="time for a client to send the body, seconds")
    max_held_bytes: int = Field(
        512 * 1024 * 1024,
        ge=1024,
        description="memory for all request bodies that are being received, queued or running, bytes",
    )
    max_connections: int | None = Field(
        None,
        ge=1,
        description="client connections per process; default: by the limit of open files, at most 16384",
    )
    stall_timeout_s: Positive = Field(120.0, description="how long a client may read nothing of its answer, seconds")
    keep_alive_s: Positive = Field(75.0, description="how long an idle client connection stays open, seconds")
    gzip_from_bytes: int | None = Field(
        None,
        ge=64,
        description="smallest JSON answer, in bytes, that is compressed for clients that accept gzip; default: none is",
    )
    address_rpm: int | None = Field(
        None,
        ge=1,
        description="requests per minute from one address, including those with a wrong key; more are refused with 429",
    )

    @model_validator(mode="after")
    def _one_body_fits(self) -> Self:
        if self.max_held_bytes * 4 < self.max_body_bytes * 5:
            raise ValueError("max_held_bytes must be at least 5/4 of max_body_bytes, or the largest body never fits")
        return self


class AdmissionSettings(BaseModel):
    """The queue, and how many requests an engine receives beyond its batch."""

    model_config = ConfigDict(extra="forbid")

    max_waiting: int = Field(10_000, ge=0, description="queued requests per model; more are refused with 429")
    queue_timeout_s: Positive | None = Field(600.0, description="longest time in the queue, seconds")
    max_sequences: int = Field(128, ge=1, description="most answers of one request: prompts times `n`")
    ahead: int | None = Field(
        None, ge=0, description="sequences sent to a worker beyond its batch; default: the policy's choice"
    )


class DisaggregationSettings(BaseModel):
    """When prefill runs at another worker than decode."""

    model_config = ConfigDict(extra="forbid")

    min_prompt_tokens: int = Field(128, ge=1, description="prompts with fewer uncached tokens are not split")
    busy_tokens: int = Field(8192, ge=1, description="a prefill worker with more pending prompt tokens is not used")
    max_arriving_tokens: int = Field(
        16384, ge=1, description="most prompt tokens whose KV cache is in transfer to one decode worker"
    )
    balance_roles: bool = Field(
        False,
        description="let workers of role `both` prefer the side that is short; refused beside objectives",
    )
    prefill_timeout_s: Positive = Field(
        120.0, description="longest time for prefill at another worker, seconds; then the decode worker does it"
    )


class SloTarget(BaseModel):
    """Latency objectives of one model, in place of the general ones."""

    model_config = ConfigDict(extra="forbid")

    ttft_s: Positive | None = Field(None, description="TTFT objective, seconds")
    tpot_s: Positive | None = Field(None, description="TPOT objective, seconds")


class SloSettings(BaseModel):
    """Latency objectives: metrics and alerts use them, and placement aims at those that are set."""

    model_config = ConfigDict(extra="forbid")

    ttft_s: Positive | None = Field(None, description="TTFT objective, seconds; without one, metrics and alerts use 2")
    tpot_s: Positive | None = Field(
        None,
        description="TPOT objective, seconds; without one, metrics and alerts use 0.1",
    )
    models: dict[str, SloTarget] = Field(
        default_factory=dict, description="objectives per model, e.g. {large: {tpot_s: 0.05}}"
    )

    def of(self, model: str) -> SloTarget:
        """What is set for a model: its own objectives, else the general ones."""
        own = self.models.get(model, SloTarget())
        return SloTarget(ttft_s=own.ttft_s or self.ttft_s, tpot_s=own.tpot_s or self.tpot_s)

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

    meter: bool = Field(False, description="account GPU-seconds and money by tenant, model and tier, for /admin/usage")
    currency: str = Field("", max_length=16, description="currency shown with every amount, e.g. EUR")
    gpu_hour: Money = Field(0.0, description="price of one GPU hour, for models without token prices")
    models: dict[str, ModelPrice] = Field(
        default_factory=dict, description="prices per million tokens by requested model name; `*` applies to all others"
    )


class HealthSettings(BaseModel):
    """When a worker counts as failed, when it is tried again, and how its requests are retried."""

    model_config = ConfigDict(extra="forbid")

    attempts: int = Field(3, ge=1, le=10, description="most workers tried for one request")
    probe_timeout_s: Positive = Field(5.0, description="timeout of a health probe, seconds")
    failures: int = Field(
        5, ge=1, description="consecutive failed requests after which a worker receives none for a while"
    )
    stall_s: Positive = Field(
        60.0, description="longest silence of a stream while its engine produces no tokens, seconds"
    )
    drain_s: Positive = Field(300.0, description="time for running streams to finish at a drained worker, seconds")
    canary: Literal["off", "answers", "same"] = Field(
        "answers", description="what a worker must answer to a test prompt before it receives requests"
    )


class RecordSettings(BaseModel):
    """Recording of traffic as a trace without content, for `evenhand replay`."""

    model_config = ConfigDict(extra="forbid")

    folder: Path | None = Field(None, description="folder for recorded traffic; default: nothing is recorded")
    max_bytes: int = Field(1024**3, ge=1024**2, description="size of all files together, bytes; the oldest is removed")
    file_bytes: int = Field(64 * 1024**2, ge=1024, description="size of one file, bytes")


class TierSettings(BaseModel):
    """Service tiers: requests that go first, and requests that use the capacity that others leave."""

    model_config = ConfigDict(extra="forbid")

    flex_cost: float = Field(0.5, ge=0, description="factor for flex tokens in limits, budgets and price")
    priority_cost: float = Field(2.0, ge=0, description="the same for priority tokens")
    flex_timeout_s: Positive = Field(600.0, description="longest time of a flex request in the queue, seconds")
    flex_reserve: float = Field(
        0.05, ge=0, lt=1, description="share of the starts that flex requests get when others would use every slot"
    )
    flex_share: float = Field(
        0.25, gt=0, le=1, description="largest share of the slots for flex requests, on a worker without our scheduler"
    )


class BatchSettings(BaseModel):
    """OpenAI's Batch API: files of requests that run as tier flex."""

    model_config = ConfigDict(extra="forbid")

    folder: Path | None = Field(None, description="folder for files and batches; default: the Batch API is off")
    files_url: str | None = Field(
        None, description="keep batch files in an object store, s3://BUCKET/PREFIX, instead of the folder"
    )
    shared: bool = Field(
        False,
        description="let several gateways run the same batches, through Redis and a folder or bucket of all of them",
    )
    max_requests: int = Field(50_000, ge=1, description="most requests in one batch")
    tenant_bytes: int = Field(10 * 1024**3, ge=1, description="storage per tenant, bytes")
    keep_days: Positive = Field(30.0, description="days after which a file is removed")


class SleepSettings(BaseModel):
    """Sleep and wake-up of idle models."""

    model_config = ConfigDict(extra="forbid")

    after_s: Positive | None = Field(
        None, description="idle time after which a model is put to sleep, seconds; default: never"
    )
    level: Literal[1, 2] = Field(1, description="vLLM's sleep level: 1 keeps the weights in CPU memory, 2 reloads them")
    max_wait_s: Positive = Field(300.0, description="longest time a request waits for a model to wake up, seconds")
    from_zero: list[str] = Field(
        default_factory=list,
        description="a model that an autoscaler starts when requests wait for it; they wait while no worker serves it",
    )


class LoraSettings(BaseModel):
    """How LoRA adapters are loaded at workers."""

    model_config = ConfigDict(extra="forbid")

    per_worker: int | None = Field(
        None,
        ge=1,
        description="most LoRA adapters at a worker; default: the engine's --max-cpu-loras if it runs our scheduler, "
        "otherwise 1",
    )
    load_timeout_s: Positive = Field(120.0, description="timeout of loading an adapter, seconds")
    unmanaged: bool = Field(
        True, description="serve adapters that engines loaded on their own as models, to every tenant"
    )


class TracingSettings(BaseModel):
    """One OpenTelemetry trace per request."""

    model_config = ConfigDict(extra="forbid")

    endpoint: str | None = Field(
        None, pattern="^https?://", description="OTLP/HTTP endpoint for spans, e.g. http://127.0.0.1:4318/v1/traces"
    )
    share: float = Field(
        1.0, ge=0, le=1, description="share of the requests that are traced, unless the caller decided"
    )


class Settings(BaseSettings):
    """The gateway's settings."""

    model_config = SettingsConfigDict(
        env_prefix="EVENHAND_", env_nested_delimiter="__", extra="forbid", nested_model_default_partial_update=True
    )

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on")
    tls_cert: Path | None = Field(None, description="PEM file with the server certificate; reloaded when it changes")
    tls_key: Path | None = Field(None, description="PEM file with its private key, if it is in another file")
    cors_origins: list[str] = Field(
        default_factory=list,
        description="origin whose web pages may call this gateway, e.g. https://chat.example, or *",
    )
    trusted_proxies: list[str] = Field(
        default_factory=list,
        description="address or network of a proxy whose Forwarded and X-Forwarded-For headers are trusted, "
        "e.g. 10.0.0.0/8",
    )
    policy: str = Field("fcfs", description="scheduling policy: fcfs, mlfq, vtc, gittins or srpt")
    policy_options: dict[str, str] = Field(default_factory=dict, description="an option of the policy, see below")
    workers: list[str] = Field(
        default_factory=list,
        description="an OpenAI-compatible engine, e.g. http://127.0.0.1:8101,slots=256, or https://host,key=ENV_NAME,ca=FILE",
    )
    models: dict[str, Any] = Field(
        default_factory=dict,
        description="a model name that clients may use and the model that serves it, e.g. gpt-4o-mini=smollm2; "
        "`*` stands for every name that is not served",
    )
    adapters: dict[str, Any] = Field(
        default_factory=dict,
        description="a LoRA adapter that is loaded on the first request for it, e.g. sql=smollm2:/adapters/sql",
    )
    worker_ca: Path | None = Field(
        None, description="PEM file with the CA of the workers' certificates, for workers without `ca`"
    )
    worker_cert: Path | None = Field(
        None, description="PEM file with the gateway's client certificate, for workers that require one"
    )
    worker_cert_key: Path | None = Field(None, description="PEM file with its private key, if it is in another file")
    gateway_processes: int = Field(1, ge=1, le=64, description="processes of this gateway, on one port")
    probe_s: Positive = Field(1.0, description="interval of health probes, seconds")
    lame_duck_s: float = Field(
        0.0, ge=0, description="after a stop signal, how long requests are accepted while /ready answers 503, seconds"
    )
    shutdown_s: Positive = Field(30.0, description="time for running requests to finish after a stop signal, seconds")
    tenants: Path | None = Field(
        None, description="YAML file with the tenants, their keys and limits; reloaded when it changes"
    )
    allow_open: bool = Field(
        False, description="allow requests without a key on an address that other machines can reach"
    )
    admin_key: SecretStr | None = Field(None, min_length=16, description="key for /admin; without one /admin is closed")
    admin_host: str = Field("127.0.0.1", description="address of /admin and the console")
    admin_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="port of /admin and the console; default: `port` + 1000; the same as `port`: on the public address",
    )
    redis_url: RedisUrls = Field(
        default_factory=list,
        description="Redis that replicas share, e.g. redis://HOST:6379/0; several share the tenants out, in the same "
        "order at every gateway; set EVENHAND_REDIS_URL if there is a password",
    )
    replica: str = Field(
        "", max_length=64, description="this gateway's name among its replicas; default: the host name"
    )
    sync_s: Positive = Field(0.1, le=5.0, description="interval of the exchange with the replicas, seconds")
    salt_cache: bool = Field(
        False,
        description="separate prefix caches per tenant, so that response times reveal nothing about others' prompts",
    )
    tenant_labels: int = Field(20, ge=1, le=1000, description="most tenants named in metrics; the rest is `other`")
    log_format: LogFormat = Field("text", description="log format: text, or json with one line per request")
    log_level: LogLevel = Field("info", description="lowest level that is logged")
    edge: EdgeSettings = EdgeSettings()
    admission: AdmissionSettings = AdmissionSettings()
    record: RecordSettings = RecordSettings()
    tiers: TierSettings = TierSettings()
    batch: BatchSettings = BatchSettings()
    tracing: TracingSettings = TracingSettings()
    sleep: SleepSettings = SleepSettings()
    lora: LoraSettings = LoraSettings()
    disaggregation: DisaggregationSettings = DisaggregationSettings()
    slo: SloSettings = SloSettings()
    health: HealthSettings = HealthSettings()
    cost: CostSettings = CostSettings()

    @model_validator(mode="after")
    def _one_balance_of_roles(self) -> Self:
        if self.disaggregation.balance_roles and self.slo.named:
            raise ValueError(
                "with latency objectives every engine takes the side that is short by itself: remove --balance-roles "
                "(disaggregation.balance_roles), or the objectives (slo)"
            )
        return self


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


@ended_by_ctrl_c()
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
        return FromFile(**overrides)
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
    if not problem["loc"]:  # settings that do not go together; the input is all of them, with their secrets
        return str(problem["msg"]).removeprefix("Value error, ")
    name = ".".join(str(part) for part in problem["loc"])
    if name.partition(".")[0] in ("admin_key", "redis_url", "engine_key"):
        return f"setting {name!r}: {problem['msg']}"
    return f"setting {name!r}: {problem['msg']} (got {problem.get('input')!r})"
