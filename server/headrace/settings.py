"""Every setting of the processes, and what commands share: flags, environment, documentation.

A setting comes from the flag, else the environment (`HEADRACE_GRPC_ADDRESS` for `serve`,
`HEADRACE_MONITOR_GRPC_ADDRESS` for `monitor`, `HEADRACE_ADDRESS` for other commands), else the file
named by `--config` (key `grpc_address`), else the default. Nothing else reads the environment.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from headrace.errors import StartupError


class Settings(BaseSettings):
    """What settings of every process have in common; fixed for its life."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    toml_file: ClassVar[Path | None] = None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 none of it is read
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 none of it is read
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        if cls.toml_file is None:
            return init_settings, env_settings
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, cls.toml_file)


class ServeSettings(Settings):
    """Settings of one gateway process."""

    model_config = SettingsConfigDict(env_prefix="HEADRACE_")

    model_repository: Path = Field(
        description="Folder of models, in Triton's layout: <model>/config.pbtxt, "
        "<model>/<version>/model.onnx."
    )
    feature_repo: Path | None = Field(
        None,
        description="Feast feature repository, applied already: a folder with a "
        "feature_store.yaml. Without it only models that need no features are ready.",
    )
    grpc_address: str = Field(
        "127.0.0.1:8500",
        description="host:port of the gRPC server. Port 0 takes a free one; a host other than "
        "loopback opens the server to the network.",
    )
    http_address: str = Field(
        "127.0.0.1:8501",
        description="host:port for /healthz, /readyz and /metrics, which change nothing.",
    )
    workers: int | None = Field(
        None,
        ge=1,
        le=256,
        description="Processes that share the gRPC port, each with models, queues and caches of "
        "its own. By default one for each core but one, or one for each NVIDIA GPU where "
        "onnxruntime-gpu is installed.",
    )
    worker_start_timeout_s: float = Field(
        600.0,
        ge=1,
        le=86_400,
        description="How long one of several workers may take to load models and serve, in "
        "seconds; then it is ended and replaced, or at the first start everything ends.",
    )
    model_control_mode: Literal["poll", "explicit", "none"] = Field(
        "poll",
        description="What loads and unloads models after the start: changes in the model "
        "repository, requests (RepositoryModelLoad; nothing is loaded before), or nothing.",
    )
    settle_s: float = Field(
        1.0,
        gt=0,
        le=600,
        description="How long a version's files must have stood still before it is loaded, in "
        "seconds; one whose manifest.json matches is loaded at once.",
    )
    repository_poll_s: float = Field(
        5.0,
        ge=0.1,
        le=3600,
        description="How often to look at the model repository when the operating system "
        "announces no change, in seconds.",
    )
    ingress: Literal["completion-queue", "threads"] = Field(
        "completion-queue",
        description="How hot calls are taken: straight from grpcio's completion queue, or through "
        "its public API, slower.",
    )
    reflection: bool = Field(
        default=False, description="Whether to serve gRPC reflection, for grpcurl and the like."
    )
    max_message_bytes: int = Field(
        64 * 2**20, ge=1024, le=2**31 - 1, description="Largest gRPC message, in and out, in bytes."
    )
    max_concurrent_streams: int = Field(
        1_024,
        ge=1,
        le=16_384,
        description="Calls, and streams, that one connection may have under way; further ones "
        "wait at the client. See Deadlines and overload.",
    )
    max_queue_size: int = Field(
        4_096,
        ge=1,
        le=1_000_000,
        description="Requests that may wait per model version; one more is refused with "
        "RESOURCE_EXHAUSTED. A model's dynamic_batching.default_queue_policy overrides it.",
    )
    max_queue_bytes: int = Field(
        512 * 2**20,
        ge=2**20,
        description="Bytes of requests that may wait per model version, likewise.",
    )
    caller_header: str | None = Field(
        None,
        description="Metadata key whose value says who calls, such as x-caller; callers then have "
        "fair shares of every queue. It is believed: let a proxy set it.",
    )
    caller_rate_per_s: float | None = Field(
        None,
        ge=1e-6,
        le=1e9,
        description="Rows that each caller may ask for per second and worker, on average; beyond "
        "it RESOURCE_EXHAUSTED. Needs --caller-header; without it there is no quota.",
    )
    caller_burst: float | None = Field(
        None,
        ge=1,
        le=1e12,
        description="Rows that a caller who was idle may ask for at once; by default those of one "
        "second.",
    )
    feature_codel_target_s: float | None = Field(
        None,
        gt=0,
        le=60,
        description="Longest wait of a request for features, in seconds, once the oldest has "
        "waited longer for a whole --feature-codel-interval-s; by default there is no such limit.",
    )
    feature_codel_interval_s: float = Field(
        0.1,
        gt=0,
        le=600,
        description="How long more than --feature-codel-target-s is put up with, in seconds.",
    )
    max_entities: int = Field(
        10_000, ge=1, le=1_000_000, description="Rows in one request to a model with features."
    )
    feature_timeout_s: float = Field(
        1.0,
        gt=0,
        le=60,
        description="Longest that one batch waits for its features, in seconds; its requests then "
        "fail with UNAVAILABLE.",
    )
    feature_cache_rows: int = Field(
        100_000,
        ge=0,
        le=10_000_000,
        description="Rows of features kept per feature service and entity key, where every view "
        "of the key has the tag headrace.cache_max_age_s; 0 keeps none. With Redis only.",
    )
    feature_cache_invalidation: bool = Field(
        default=False,
        description="Whether Redis is asked to tell of written keys (CLIENT TRACKING, Redis 6 or "
        "newer), so that cached rows are dropped at once instead of when they are too old.",
    )
    registry_poll_s: float = Field(
        2.0,
        ge=0.1,
        le=3600,
        description="How often to look whether the feature registry's file has changed, in "
        "seconds. A registry that is no file is read anew as its cache_ttl_seconds says.",
    )
    on_demand_modules: str | None = Field(
        None,
        description="Python modules whose on-demand feature views may run, dotted names separated "
        "by commas, found on Python's path or else in the feature repository. Importing them runs "
        "whatever is in them. Views of other modules are refused.",
    )
    allow_feature_writes: bool = Field(
        default=False,
        description="Whether GrpcFeatureServer's Push and WriteToOnlineStore write, through Feast, "
        "for whoever reaches the port; PERMISSION_DENIED otherwise.",
    )
    feast_compat: bool = Field(
        default=False,
        description="Whether Feast's services answer as Feast itself does: every status is "
        "PRESENT, and values older than their view's TTL are values.",
    )
    drain_delay_s: float = Field(
        5.0,
        ge=0,
        le=600,
        description="How long to keep serving after SIGTERM with health NOT_SERVING, in seconds, "
        "so that load balancers notice first.",
    )
    drain_timeout_s: float = Field(
        30.0,
        gt=0,
        le=600,
        description="How long requests that were accepted may take to finish when stopping, "
        "in seconds.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe log line to write."
    )
    allow_log_settings: bool = Field(
        default=False,
        description="Whether callers may change the log level (LogSettings), of all workers; "
        "anybody may ask for it.",
    )

    monitor_address: str | None = Field(
        None,
        description="host:port of a `headrace monitor` to stream predictions to; without it "
        "nothing is streamed.",
    )
    monitor_queue_bytes: int = Field(
        32 * 2**20,
        ge=2**20,
        description="Bytes of finished batches that may wait for the monitor; newer ones are "
        "dropped and counted.",
    )

    skew_log_dir: Path | None = Field(
        None,
        description="Folder for the features of sampled requests, in Parquet, for `headrace "
        "features skew`; made if need be, shared by several processes if they like. Without it "
        "nothing is logged.",
    )
    skew_sample_share: float = Field(
        0.01,
        gt=0,
        le=1,
        description="Share of entity keys whose every read is logged there.",
    )
    skew_log_bytes: int = Field(
        2**30,
        ge=2**20,
        description="Bytes of the skew log's files together; the oldest are deleted to make room.",
    )
    skew_file_rows: int = Field(
        100_000,
        ge=1,
        le=10_000_000,
        description="Rows of one model version that make a file of the skew log, about.",
    )
    skew_file_s: float = Field(
        300.0,
        ge=1,
        le=86_400,
        description="Longest that rows wait for their file of the skew log, in seconds.",
    )
    skew_queue_bytes: int = Field(
        32 * 2**20,
        ge=2**20,
        description="Bytes of rows that may wait for their file of the skew log; newer ones are "
        "dropped and counted.",
    )

    @field_validator("caller_header")
    @classmethod
    def _is_metadata_key(cls, value: str | None) -> str | None:
        if value is None:
            return None
        value = value.lower()
        if not re.fullmatch(r"[0-9a-z_.-]{1,100}", value) or value.endswith("-bin"):
            raise ValueError("expected the key of text metadata: letters, digits, '_', '-', '.'")
        if value.startswith("grpc-"):
            raise ValueError("keys that begin with 'grpc-' are gRPC's own")
        return value

    @model_validator(mode="after")
    def _has_callers(self) -> "ServeSettings":
        if self.caller_rate_per_s is not None and self.caller_header is None:
            raise ValueError("--caller-rate-per-s needs --caller-header")
        if self.caller_burst is not None and self.caller_rate_per_s is None:
            raise ValueError("--caller-burst needs --caller-rate-per-s")
        return self

    @field_validator("grpc_address", "http_address", "monitor_address")
    @classmethod
    def _is_host_and_port(cls, value: str | None) -> str | None:
        if value is not None:
            split_address(value)
        return value


class MonitorSettings(Settings):
    """Settings of one monitor process."""

    model_config = SettingsConfigDict(env_prefix="HEADRACE_MONITOR_")

    model_repository: Path | None = Field(
        None,
        description="Folder of models; reference profiles are read from "
        "<model>/<version>/profile.json. Without one, or without it, drift is not judged.",
    )
    grpc_address: str = Field(
        "127.0.0.1:8510",
        description="host:port that takes prediction streams and outcomes. Port 0 takes a free "
        "one; a host other than loopback opens the monitor to the network.",
    )
    http_address: str = Field(
        "127.0.0.1:8511",
        description="host:port of the report (/ and /report.json), /healthz, /readyz and "
        "/metrics, which change nothing.",
    )
    state_dir: Path | None = Field(
        None,
        description="Folder for what must survive a restart; without it everything is forgotten.",
    )
    window_s: float = Field(
        60.0, ge=0.1, le=86_400, description="Shortest time that is judged as one, in seconds."
    )
    window_rows: int = Field(
        1_000,
        ge=50,
        le=10_000_000,
        description="Fewest rows that are judged as one: a window stays open until it has them.",
    )
    label_coverage: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Share of a window's kept predictions whose outcomes must be known before its "
        "error is judged.",
    )
    kept_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of requests whose predictions are kept until their outcomes come.",
    )
    kept_predictions: int = Field(
        2_000_000, ge=1_000, description="Most predictions kept; the oldest windows go first."
    )
    kept_days: float = Field(
        120.0, gt=0, le=3_650, description="How long a prediction waits for its outcome, in days."
    )
    webhook_url: str | None = Field(
        None, description="http(s) address that gets each alarm as a CloudEvent."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe log line to write."
    )

    @field_validator("grpc_address", "http_address")
    @classmethod
    def _is_host_and_port(cls, value: str) -> str:
        split_address(value)
        return value


class CommandSettings(Settings):
    """What commands that ask a gateway, or look at its features, share with each other."""

    model_config = SettingsConfigDict(env_prefix="HEADRACE_")

    address: str = Field("127.0.0.1:8500", description="host:port of the gateway to ask.")
    feature_repo: Path | None = Field(
        None, description="Feast feature repository, applied already; as for `headrace serve`."
    )
    timeout_s: float = Field(
        10.0, gt=0, le=3600, description="How long to wait for an answer, in seconds."
    )

    @field_validator("address")
    @classmethod
    def _is_host_and_port(cls, value: str) -> str:
        split_address(value)
        return value


SettingsT = TypeVar("SettingsT", bound=Settings)


def load_settings(flags: Mapping[str, Any], config: Path | None = None) -> ServeSettings:
    """Put the settings of a gateway together; see `load`."""
    return load(ServeSettings, flags, config)


def load(kind: type[SettingsT], flags: Mapping[str, Any], config: Path | None = None) -> SettingsT:
    """
    Put settings together.

    Args:
        kind: Whose.
        flags: Those given on the command line, by field name.
        config: A TOML file.

    Raises:
        StartupError: what is missing or wrong, all of it, in one line.
    """
    if config is not None and not os.access(config, os.R_OK):
        what = "cannot be read" if config.exists() else "no such file"
        raise StartupError(f"--config {config}: {what}")
    if config is not None and not config.is_file():
        raise StartupError(f"--config {config}: not a file")
    source = type(kind.__name__, (kind,), {"toml_file": config, "__module__": __name__})
    try:
        settings = source(**flags)
    except ValidationError as error:
        faults = []
        for fault in error.errors():
            name = ".".join(map(str, fault["loc"]))
            if not name:  # about several of them together, which it names
                faults.append(fault["msg"])
                continue
            variable = f"{kind.model_config['env_prefix']}{name.upper()}"
            faults.append(f"--{name.replace('_', '-')} (or {variable}): {fault['msg']}")
        raise StartupError("; ".join(faults)) from None
    except (SettingsError, ValueError) as error:
        raise StartupError(f"settings: {error}") from None
    assert isinstance(settings, kind)
    return settings


def split_address(address: str) -> tuple[str, int]:
    """
    Split `host:port`; an IPv6 host is in brackets.

    Raises:
        ValueError: it is not of that form.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65_535:
        raise ValueError(f"expected host:port, got '{address}'")
    return host.strip("[]"), int(port)


def join_address(host: str, port: int) -> str:
    """Put together what `split_address` took apart."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
