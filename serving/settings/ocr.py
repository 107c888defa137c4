"""The OCR service's section of the settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, SecretStr, field_validator

from serving.settings.base import Amount, Frozen, Name
from serving.settings.router import RemoteImageSettings


class RenderSettings(Frozen):
    """How documents become pages, and what a document may cost."""

    workers: Annotated[int, Field(ge=1, le=256)] = 2
    """Processes that render, each one page at a time."""
    max_pages: Annotated[int, Field(ge=1)] = 1000
    """Of one document that are read at once; of a longer one pages have to be chosen."""
    max_page_pixels: Annotated[int, Field(ge=1, le=178_000_000)] = 50_000_000
    """A page that has more, or would have at its dpi, fails."""
    dpi: Annotated[int, Field(ge=18, le=600)] = 144
    """Of PDF pages when a request doesn't say; the published code's own."""
    page_timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """After so long on one page a worker is killed, and the page has failed: for one that hangs. What it may compute is
    `page_cpu_s`, which others that keep the machine busy do not use up."""
    page_cpu_s: Annotated[int, Field(ge=1)] = 15
    """CPU seconds after which the kernel ends a worker that is at one page, and the page has failed."""
    document_cpu_s: Annotated[float, Field(gt=0)] = 1800.0
    """CPU seconds that drawing one document may take; the pages that are left then fail with
    `document_too_costly`."""
    max_lost_pages: Annotated[int, Field(ge=1)] = 5
    """Of one document, pages whose worker was killed or died. After so many, the pages that are left fail with
    `document_too_costly`."""
    tenant_cpu_s_per_minute: Annotated[float, Field(gt=0)] = 60.0
    """CPU seconds a minute of a tenant's drawing that keep their turn. Pages of a tenant that has used more wait
    behind those of tenants that have not; nobody waits while a worker is idle. Counted by each service for itself."""
    worker_memory_bytes: Annotated[int, Field(ge=256 * 2**20)] = 2 * 2**30
    """Address space of one worker."""
    pages_per_worker: Annotated[int, Field(ge=1)] = 500
    """After so many a worker is replaced: what a document leaked goes with it."""


class ReadSettings(Frozen):
    """How pages are read through the router."""

    max_tries: Annotated[int, Field(ge=1, le=10)] = 4
    """Requests per page, the first one included; those that the router refuses for the moment (429, 503) apart."""
    page_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """For one page, all its tries and the waits between them together."""
    silence_timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """Longest time without a byte of an answer."""
    max_wait_s: Annotated[float, Field(gt=0)] = 90.0
    """A page fails when the router asks for a longer wait (`Retry-After`) than this."""


class JobSettings(Frozen):
    """Documents that are read while nobody waits: kept in the ledger's database, read by whichever service is free."""

    running: Annotated[int, Field(ge=1, le=64)] = 2
    """Jobs that one service process reads at once."""
    turn_s: Annotated[float, Field(ge=0)] = 60.0
    """After so long a job gives its place up between two pages, and goes on at its next turn, when a tenant with fewer
    jobs running waits for a place. A tenant that holds two places more than one that waits gives one up at once."""
    max_open_per_tenant: Annotated[int, Field(ge=1)] = 100
    """Queued and running; more are refused with 429."""
    lease_s: Annotated[float, Field(ge=1, le=600)] = 15.0
    """A job whose service has not been heard of for so long is taken over by another one, or by the same one started
    again. Clocks of the services' machines must agree within a fraction of it."""
    poll_s: Annotated[float, Field(gt=0, le=60)] = 2.0
    """How often a service looks for jobs that others have taken in or left."""
    settle_s: Annotated[float, Field(ge=0, le=60)] = 5.0
    """How long after taking a job over from another service a service waits until the ledger has what that one's last
    requests were charged: pages that are read again are not charged again for it."""
    keep_documents_s: Annotated[float, Field(ge=0)] = 0.0
    """How long a document is kept after its job has ended."""
    keep_results_s: Annotated[float, Field(ge=1)] = 7 * 86_400.0
    """After so long a job that has ended is deleted with its results."""
    max_age_s: Annotated[float, Field(ge=1)] = 7 * 86_400.0
    """A job that has not ended by then fails."""


class OcrSettings(Frozen):
    """Documents in, text out: a service beside the router, and a client of it."""

    enabled: bool = False
    """Whether `serving up` starts it."""
    host: str = "127.0.0.1"
    """Address that it listens on and is known to routers by; `auto` takes the node's own."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """0 takes a free one, which routers learn by themselves."""
    allow_unauthenticated: bool = False
    """Must be said before a service listens on an address that others can reach while its router asks for no keys."""
    num_replicas: Annotated[int, Field(ge=1, le=100)] = 1
    cpus_per_replica: Annotated[float, Field(ge=0)] = 0.5
    resources_per_replica: dict[Name, Amount] = Field(default_factory=dict)
    """Ray's custom resources: with them only nodes that were given some take a service."""
    router_url: str | None = None
    """`http(s)://host:port`; None is the stack's own."""
    directory: Path = Field(default=Path("data/ocr"), validate_default=True)
    """Documents while they are read, those of jobs too: services that share a database share this folder as well."""
    secret: SecretStr | None = None
    """What jobs' API keys are encrypted with, and what services and routers know each other by: a page that has to be
    read again is not charged again only where both have the same. None makes a file `secret` in `directory`."""
    playground: bool = True
    """A page for people at `/`."""
    max_document_bytes: Annotated[int, Field(ge=1024)] = 100 * 2**20
    """Of an upload; inside JSON `router.limits.max_body_bytes` comes first. How slowly it may come is
    `router.limits.min_body_bytes_per_s`'s to say."""
    max_documents: Annotated[int, Field(ge=1)] = 32
    """That one process takes in or reads at once, jobs apart; more are refused with 503."""
    max_submissions: Annotated[int, Field(ge=1)] = 32
    """Jobs whose documents one process takes in at once; more are refused with 503."""
    tenant_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Part of what other tenants leave of `max_documents`, `max_submissions`, `max_stored_bytes`, `max_result_bytes`
    and the memory for JSON bodies that one tenant may hold; more is refused with 429. Where the router asks for no
    keys, everybody may hold the whole."""
    max_stored_bytes: Annotated[int, Field(ge=1024)] = 8 * 2**30
    """Bytes of documents in `directory`, those of services that share it included; more are refused with 503
    `storage_full`."""
    max_result_bytes: Annotated[int, Field(ge=1024)] = 8 * 2**30
    """Bytes of jobs' results in the database. Beyond it new jobs are refused with 503 `storage_full`; those that were
    taken in are read to their ends."""
    pages_in_parallel: Annotated[int, Field(ge=1, le=256)] = 8
    """Pages of one document that are with the router at once."""
    max_figures: Annotated[int, Field(ge=0, le=1000)] = 32
    """Per page that are cut out when a request asks for images."""
    max_figure_bytes: Annotated[int, Field(ge=0)] = 32 * 2**20
    """Of all figures of one document together; those beyond it are left out of its answer."""
    markdown_prompt: str = "<|grounding|>Convert the document to markdown."
    """For the formats `markdown` and `layout`, when a request has no prompt of its own."""
    text_prompt: str = "Free OCR."
    remote_documents: RemoteImageSettings = RemoteImageSettings()
    """Documents by URL: off, like the router's remote images, and with the same rules."""
    render: RenderSettings = RenderSettings()
    read: ReadSettings = ReadSettings()
    jobs: JobSettings = JobSettings()

    @property
    def secret_file(self) -> Path:
        """Where the secret is that no setting names; the first service makes it."""
        return self.directory / "secret"

    @field_validator("directory")
    @classmethod
    def _resolve(cls, directory: Path) -> Path:
        """Replicas run elsewhere than the command that read the settings."""
        return directory.expanduser().absolute()

    @field_validator("router_url")
    @classmethod
    def _check_url(cls, url: str | None) -> str | None:
        if url is not None and not url.startswith(("http://", "https://")):
            raise ValueError("must begin with http:// or https://")
        return url.rstrip("/").removesuffix("/v1") if url is not None else None
