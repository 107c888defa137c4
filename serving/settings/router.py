"""The router's section of the settings: who may come, what may come, and what happens when too much comes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, StringConstraints, field_validator, model_validator

from serving.settings.base import Amount, Frozen, Name, is_loopback


class LimitSettings(Frozen):
    """Bounds on everything a client controls."""

    max_body_bytes: Annotated[int, Field(ge=1024)] = 50 * 2**20
    max_held_bytes: Annotated[int, Field(ge=1024)] = 2 * 2**30
    """Bodies of all requests that one router holds at once, waiting or running; beyond it answers are 503."""
    max_header_bytes: Annotated[int, Field(ge=1024)] = 32 * 2**10
    max_json_depth: Annotated[int, Field(ge=4, le=512)] = 64
    max_json_values: Annotated[int, Field(ge=1000)] = 200_000
    """Objects, lists and scalars of one body: a few bytes of JSON become a hundred of memory each."""
    max_image_pixels: Annotated[int, Field(ge=1, le=178_000_000)] = 50_000_000
    """At most what Pillow opens before it calls an image a decompression bomb."""
    max_images: Annotated[int, Field(ge=1)] = 16
    max_messages: Annotated[int, Field(ge=1)] = 256
    max_choices: Annotated[int, Field(ge=1)] = 16
    """Largest `n` and `best_of`, and most prompts of a completion: each is a whole sequence on the engine."""
    header_timeout_s: Annotated[float, Field(gt=0)] = 10.0
    """From a request's first byte (or a new connection's start) to the end of its headers."""
    body_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """The longest silence in a body, and how long one may be slower than `min_body_bytes_per_s`."""
    min_body_bytes_per_s: Annotated[int, Field(ge=1)] = 8 * 2**10
    """A body that comes steadily at this rate or faster may take as long as it takes."""
    write_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """A client that takes no byte of its answer for so long is dropped."""


class RemoteImageSettings(Frozen):
    """Images that the router fetches for a client. Off, since it makes the router a client of others' choosing."""

    enabled: bool = False
    hosts: tuple[str, ...] = ()
    """Host names that may be fetched from; `*.example.com` takes every name below it, `*` all public hosts, and
    `host:port` another port than the usual."""
    max_bytes: Annotated[int, Field(ge=1024)] = 20 * 2**20
    timeout_s: Annotated[float, Field(gt=0)] = 10.0
    """For all images of a request together."""
    max_redirects: Annotated[int, Field(ge=0, le=10)] = 3

    @model_validator(mode="after")
    def _check_hosts(self) -> RemoteImageSettings:
        if self.enabled and not self.hosts:
            raise ValueError("remote_images needs hosts when enabled ('*' for every public one)")
        return self


class AdmissionSettings(Frozen):
    """How much work replicas get at once, and who waits for it."""

    work_per_replica: Annotated[int, Field(ge=1)] | None = None
    """Tokens (prompt, image and expected output) that a replica has under way at most; None takes what it says of
    itself: its KV cache."""
    max_queue: Annotated[int, Field(ge=0)] = 1024
    """Requests of a model that may wait in one router; more are refused with 503."""
    expected_output_tokens: Annotated[int, Field(ge=1)] = 512
    """Taken for a mode until its answers have shown their length."""
    high_reserve: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Part of a replica's capacity that only requests of the high priority class may fill."""
    request_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """A request's whole time, waiting included; `x-request-timeout-ms` may ask for less."""
    replica_wait_s: Annotated[float, Field(ge=0)] = 30.0
    """How long requests may wait while no replica of their model is ready."""


class BreakerSettings(Frozen):
    """When a replica that fails is left alone."""

    failures: Annotated[int, Field(ge=1)] = 3
    """So many failures in a row."""
    open_s: Annotated[float, Field(gt=0)] = 1.0
    """The first pause before one request may try it again; every failed try doubles it."""
    max_open_s: Annotated[float, Field(gt=0)] = 30.0


class RouterSettings(Frozen):
    behind_serve: bool = False
    """Routers listen where Ray Serve tells them to, and its HAProxy on every node (`RAY_SERVE_ENABLE_HA_PROXY=1`
    there) spreads clients over all of them; `host` and `port` are then HAProxy's. For clusters of several nodes."""
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    num_replicas: Annotated[int, Field(ge=1, le=100)] = 1
    cpus_per_replica: Annotated[float, Field(ge=0)] = 0.5
    resources_per_replica: dict[Name, Amount] = Field(default_factory=dict)
    """Ray's custom resources: with them only nodes that were given some take a router."""
    keys_file: Path | None = None
    """Tenants and the hashes of their keys, made by `serving keys`; read again when it changes. None: no keys."""
    allow_unauthenticated: bool = False
    """Must be said before a router without keys listens on an address that others can reach."""
    usage_in_last_chunk: bool = False
    """Whether the chunk of a stream that has the `finish_reason` carries `usage` for clients that do not set
    `stream_options.include_usage`. Under DeepInfra's `/v1/openai/` it always does, as DeepInfra's own."""
    allowed_hosts: tuple[Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9.-]{1,253}$")], ...] = ()
    """Names (without ports) that a router or OCR service answers to while it asks for no keys, beside loopback's and,
    where it listens for other machines, every IP address and its machine's name. Any other name in `Host` may be a web
    page's that was pointed here. Pages under these names may use it from other ports, too."""
    connect_timeout_s: Annotated[float, Field(gt=0)] = 5.0
    read_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Longest silence of an engine between two pieces of an answer."""
    max_tries: Annotated[int, Field(ge=1, le=10)] = 3
    report_s: Annotated[float, Field(gt=0, le=60)] = 1.0
    """How often routers tell the directory of their work, and learn of the others'."""
    limits: LimitSettings = LimitSettings()
    admission: AdmissionSettings = AdmissionSettings()
    breaker: BreakerSettings = BreakerSettings()
    remote_images: RemoteImageSettings = RemoteImageSettings()

    @field_validator("keys_file", mode="after")
    @classmethod
    def _make_absolute(cls, file: Path | None) -> Path | None:
        """Replicas run in other folders than the user's."""
        return file.expanduser().absolute() if file is not None else None

    @model_validator(mode="after")
    def _check_address(self) -> RouterSettings:
        if not is_loopback(self.host) and self.keys_file is None and not self.allow_unauthenticated:
            raise ValueError(
                f"host {self.host} can be reached by others and nobody is asked for a key; set keys_file (see `serving "
                "keys --help`), or allow_unauthenticated: true if that is meant, or listen on 127.0.0.1"
            )
        return self
