"""How the front is configured. Environment variables carry the prefix ``INFERENCE_WORKBENCH_``."""

from __future__ import annotations

import secrets
import sys
from pathlib import Path
from typing import Any

import msgspec
from platformdirs import user_data_path
from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict
from pydantic_settings import SettingsError as PydanticSettingsError

from inference_server.discovery import Origin
from inference_server.front.latency_summary import Slo
from inference_server.protocol import EngineConfig

DEFAULT_PORT = 8765


class Settings(BaseSettings):
    """Everything about a front that may be chosen. The command line's options win over the environment."""

    model_config = SettingsConfigDict(env_prefix="INFERENCE_WORKBENCH_", frozen=True)

    port: int | None = Field(default=None, ge=0, le=65535)
    """TCP port on 127.0.0.1; ``None`` tries the default one and takes any free one if that is in use."""
    uds: str | None = None
    """Path of a Unix socket to listen on instead of TCP."""
    token: str = Field(default_factory=lambda: secrets.token_urlsafe(24), min_length=1, repr=False)
    allowed_origins: tuple[str, ...] = ()
    """Origins besides the server's own that may use it, such as ``"https://lab.example.org"``; ``"*"`` allows any."""
    origin: Origin = "cli"
    """Who starts this server. One that was started by Jupyter or by a kernel ends with it."""
    log_level: str = "info"

    model: str = "default"
    served_name: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    kv_memory: int | None = Field(default=None, gt=0)
    """Bytes for the KV cache; ``None`` sizes it from what is free."""
    packed_memory: int | None = Field(default=None, ge=0)
    """Bytes for packed copies of the weights; ``None`` takes a quarter of what is free."""
    max_model_len: int | None = Field(default=None, gt=0)
    threads: int | None = Field(default=None, gt=0)
    draft_model: str | None = None
    """A smaller model with the same vocabulary, for speculative decoding."""
    eagle_head: str | None = None
    """Folder of an EAGLE-3 head for the model, for speculative decoding."""

    engine_command: tuple[str, ...] = (sys.executable, "-m", "inference_server.engine")
    """What to run as the engine; ``--config``, ``--receive`` and ``--send`` are appended."""
    engine_first_word_s: float = Field(default=120.0, gt=0)
    """How long a new engine process may take to say anything: a cold disk makes imports slow."""
    engine_silence_s: float = Field(default=30.0, gt=0)
    """An engine that is silent for longer is taken for dead and killed."""
    engine_shutdown_s: float = Field(default=5.0, gt=0)
    """How long an engine may take to end when told to."""
    loading_wait_s: float = Field(default=600.0, ge=0)
    """How long a request waits for an engine that is loading before it is refused."""

    max_body_bytes: int = Field(default=32 << 20, gt=0)
    log_events: int = Field(default=20_000, gt=0)
    """Past events kept for clients that connect or fall behind."""
    log_bytes: int = Field(default=64 << 20, gt=0)
    """Memory bound of the same."""

    recording_folder: Path = Field(default_factory=lambda: _data_folder() / "recordings")
    recording_flush_s: float = Field(default=1.0, gt=0)
    """How often a recording's journal is flushed: what a crash may cost at most."""
    recording_max_bytes: int = Field(default=2 << 30, gt=0)
    """Size of the journal at which a recording ends by itself."""
    device_sample_s: float = Field(default=1.0, gt=0)
    """Seconds between two samples of the hardware while there is work."""

    otlp_endpoint: str | None = None
    """OTLP collector over HTTP that gets a trace of each request, such as ``"http://127.0.0.1:4318"``."""

    slo_ttft_ms: float | None = Field(default=None, gt=0)
    """Objectives at the start; ``PUT /slo`` changes them."""
    slo_tpot_ms: float | None = Field(default=None, gt=0)
    slo_itl_ms: float | None = Field(default=None, gt=0)
    slo_e2e_ms: float | None = Field(default=None, gt=0)

    def slo(self) -> Slo:
        """Return the objectives."""
        return Slo(ttft_ms=self.slo_ttft_ms, tpot_ms=self.slo_tpot_ms, itl_ms=self.slo_itl_ms, e2e_ms=self.slo_e2e_ms)

    def engine_config(self) -> EngineConfig:
        """Return what the engine is started with.

        Raises
        ------
        msgspec.ValidationError
            If a value is not one that an engine accepts, such as an unknown dtype.
        """
        return msgspec.convert(
            {
                "model": self.model,
                "served_name": self.served_name,
                "device": self.device,
                "dtype": self.dtype,
                "kv_bytes": self.kv_memory,
                "packed_bytes": self.packed_memory,
                "max_model_len": self.max_model_len,
                "threads": self.threads,
                "draft_model": self.draft_model,
                "eagle_head": self.eagle_head,
            },
            EngineConfig,
        )


def _data_folder() -> Path:
    return user_data_path("inference-workbench", appauthor=False)


class SettingsError(ValueError):
    """A setting has a value that it cannot have. The message names it and says why."""


def settings_from(given: dict[str, Any]) -> Settings:
    """Return the settings of the environment, with ``given`` in front of them.

    Raises
    ------
    SettingsError
        If a value is wrong.
    """
    try:
        return Settings(**given)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise SettingsError(
            f"The setting {name!r} (INFERENCE_WORKBENCH_{name.upper()}, or --{name.replace('_', '-')}) is wrong: "
            f"{first['msg']}."
        ) from error
    except PydanticSettingsError as error:
        raise SettingsError(str(error)) from error
