"""The router's section of the settings: access, limits on requests, admission and overload."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from serving.settings.base import Amount, Frozen, Name, is_loopback

StreamUsage = Literal["finish_chunk", "extra_chunk", "asked"]


class LimitSettings(Frozen):
    """Bounds on everything a client controls."""

    max_body_bytes: Annotated[int, Field(ge=1024)] = 50 * 2**20
    max_held_bytes: Annotated[int, Field(ge=1024)] = 2 * 2**30
    """Bytes of all request bodies that one router holds, queued or running; beyond it requests are refused with 503."""
    max_header_bytes: Annotated[int, Field(ge=1024)] = 32 * 2**10
    max_json_depth: Annotated[int, Field(ge=4, le=512)] = 64
    max_json_values: Annotated[int, Field(ge=1000)] = 200_000
    """Objects, lists and scalars in one body. Each takes a few bytes of JSON but about a hundred bytes of memory."""
    max_image_pixels: Annotated[int, Field(ge=1, le=178_000_000)] = 50_000_000
    """Largest image. Pillow refuses larger ones than its own limit as decompression bombs."""
    max_images: Annotated[int, Field(ge=1)] = 16
    max_messages: Annotated[int, Field(ge=1)] = 256
    max_choices: Annotated[int, Field(ge=1)] = 16
    """Largest `n` and `best_of`, and most prompts of a completion. Each is a sequence of its own on the engine."""
    header_timeout_s: Annotated[float, Field(gt=0)] = 10.0
    """Longest time from a request's first byte, or from a new connection's start, to the end of its headers."""
    body_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """Longest pause in a body, and how long a body may be slower than `min_body_bytes_per_s`."""
    min_body_bytes_per_s: Annotated[int, Field(ge=1)] = 8 * 2**10
    """A body that arrives steadily at this rate or faster has no time limit."""
    write_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """A client that reads no byte of its answer for so long is disconnected."""


class RemoteImageSettings(Frozen):
    """Images that the router fetches by URL. Off by default, since clients then choose which hosts the router
    contacts."""

    enabled: bool = False
    hosts: tuple[str, ...] = ()
    """Host names to fetch from: `*.example.com` matches every name below it, `*` all public hosts, and `host:port` a
    port other than the default."""
    max_bytes: Annotated[int, Field(ge=1024)] = 20 * 2**20
    timeout_s: Annotated[float, Field(gt=0)] = 10.0
    """Longest time to fetch all images of one request."""
    max_redirects: Annotated[int, Field(ge=0, le=10)] = 3

    @model_validator(mode="after")
    def _check_hosts(self) -> RemoteImageSettings:
        if self.enabled and not self.hosts:
            raise ValueError("remote_images needs hosts when enabled ('*' for every public one)")
        return self


class AdmissionSettings(Frozen):
    """How much work replicas are sent at once, and how requests queue for them."""

    work_per_replica: Annotated[int, Field(ge=1)] | None = None
    """Tokens (prompt, image and expected output) that a replica processes at most; None uses the size of its KV cache,
    which the replica reports."""
    max_queue: Annotated[int, Field(ge=0)] = 1024
    """Requests for one model that may queue in one router; more are refused with 503."""
    expected_output_tokens: Annotated[int, Field(ge=1)] = 512
    """Expected output tokens of a resolution mode until answers in that mode have been observed."""
    high_reserve: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """The fraction of a replica's capacity that is reserved for requests of high priority."""
    request_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Longest time of a request, including queueing. A client may ask for less with `x-request-timeout-ms`."""
    replica_wait_s: Annotated[float, Field(ge=0)] = 30.0
    """Longest time that requests queue while no replica of their model is ready."""


class BreakerSettings(Frozen):
    """The circuit breaker: when the router stops sending requests to a failing replica."""

    failures: Annotated[int, Field(ge=1)] = 3
    """Consecutive failures that open the breaker."""
    open_s: Annotated[float, Field(gt=0)] = 1.0
    """Pause before one request may probe the replica; each failed probe doubles the next pause."""
    max_open_s: Annotated[float, Field(gt=0)] = 30.0


class RouterSettings(Frozen):
    behind_serve: bool = False
    """For clusters of several nodes: routers listen on the ports that Ray Serve assigns, and Serve's HAProxy on every
    node (`RAY_SERVE_ENABLE_HA_PROXY=1`) balances clients over them. `host` and `port` are then HAProxy's."""
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    num_replicas: Annotated[int, Field(ge=1, le=100)] = 1
    cpus_per_replica: Annotated[float, Field(ge=0)] = 0.5
    resources_per_replica: dict[Name, Amount] = Field(default_factory=dict)
    """Custom Ray resources that a router needs, to place routers on the nodes that offer them."""
    keys_file: Path | None = None
    """File of tenants and hashed keys, written by `serving keys` and reloaded when it changes. None: no
    authentication."""
    allow_unauthenticated: bool = False
    """Required to bind a router without API keys to a non-loopback address."""
    unknown_fields: Literal["ignore", "refuse"] = "ignore"
    """What becomes of a request's field that nobody here knows: it is left out and named in the answer's
    `x-ignored-parameters`, or the request is refused with 400."""
    stream_usage: StreamUsage = "finish_chunk"
    """Where a stream has `usage`, with its cost, if the client does not set `stream_options.include_usage`: in the
    chunk with the `finish_reason`, which all clients accept and many read; in a chunk of its own without choices, as
    OpenAI's when asked; or nowhere. Under DeepInfra's path `/v1/openai/` it is always in the first, as DeepInfra's."""
    allowed_hosts: tuple[Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9.-]{1,253}$")], ...] = ()
    """Host names (without ports) that a router or OCR service without API keys answers to, in addition to loopback
    names and, on a non-loopback address, IP addresses and its machine's name. Any other name in `Host` may belong to a
    web page that was made to resolve here (DNS rebinding). Pages under these names may call the service across
    ports."""
    cors_origins: tuple[
        Annotated[str, StringConstraints(pattern=r"^(\*|https?://[A-Za-z0-9.:\[\]-]{1,253})/?$")], ...
    ] = ()
    """Origins (`https://app.example.com`) whose web pages may use the API from a browser; `*`, which needs keys, allows
    all pages. A page can read what it sends the key for, so this replaces no key."""
    connect_timeout_s: Annotated[float, Field(gt=0)] = 5.0
    read_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Longest time that an engine may send nothing in the middle of an answer."""
    max_tries: Annotated[int, Field(ge=1, le=10)] = 3
    report_s: Annotated[float, Field(gt=0, le=60)] = 1.0
    """How often routers report their load to the directory and read that of the others."""
    limits: LimitSettings = LimitSettings()
    admission: AdmissionSettings = AdmissionSettings()
    breaker: BreakerSettings = BreakerSettings()
    remote_images: RemoteImageSettings = RemoteImageSettings()

    @field_validator("keys_file", mode="after")
    @classmethod
    def _make_absolute(cls, file: Path | None) -> Path | None:
        """Make paths absolute: replicas run in another working directory than the command that read the settings."""
        return file.expanduser().absolute() if file is not None else None

    @model_validator(mode="after")
    def _check_address(self) -> RouterSettings:
        if not is_loopback(self.host) and self.keys_file is None and not self.allow_unauthenticated:
            raise ValueError(
                f"host {self.host} can be reached by others and no API keys are required; set keys_file (see `serving "
                "keys --help`), or allow_unauthenticated: true if that is intended, or listen on 127.0.0.1"
            )
        return self

    @model_validator(mode="after")
    def _check_origins(self) -> RouterSettings:
        if "*" in self.cors_origins and self.keys_file is None:
            raise ValueError("cors_origins may be '*' only with a keys_file; without keys name the origins")
        return self
