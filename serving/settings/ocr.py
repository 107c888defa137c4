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
    """Number of rendering processes; each renders one page at a time."""
    max_pages: Annotated[int, Field(ge=1)] = 1000
    """Most pages of one document in one request. Requests for a longer document must select pages."""
    max_page_pixels: Annotated[int, Field(ge=1, le=178_000_000)] = 50_000_000
    """A page with more pixels, at its own size or at the requested dpi, fails."""
    dpi: Annotated[int, Field(ge=18, le=600)] = 144
    """Resolution of PDF pages when a request names none; the published code uses the same."""
    page_timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """A worker that spends longer on one page is killed and the page fails. This catches workers that hang; computing
    is limited by `page_cpu_s`, which other load on the machine does not use up."""
    page_cpu_s: Annotated[int, Field(ge=1)] = 15
    """CPU seconds that a worker may spend on one page. Beyond it the kernel ends the worker and the page fails."""
    document_cpu_s: Annotated[float, Field(gt=0)] = 1800.0
    """CPU seconds that rendering one document may take. Beyond it the remaining pages fail with
    `document_too_costly`."""
    max_lost_pages: Annotated[int, Field(ge=1)] = 5
    """Pages of one document whose worker was killed or died. Beyond it the remaining pages fail with
    `document_too_costly`."""
    tenant_cpu_s_per_minute: Annotated[float, Field(gt=0)] = 60.0
    """CPU seconds of rendering per minute that a tenant may use without losing its turn. Pages of a tenant above it
    wait behind those of tenants below it; no page waits while a worker is idle. Each service counts for itself."""
    worker_memory_bytes: Annotated[int, Field(ge=256 * 2**20)] = 2 * 2**30
    """Address space that one worker may use."""
    pages_per_worker: Annotated[int, Field(ge=1)] = 500
    """A worker is replaced after so many pages, which frees whatever documents made it leak."""


class ReadSettings(Frozen):
    """How the service sends pages to the router."""

    max_tries: Annotated[int, Field(ge=1, le=10)] = 4
    """Requests per page, including the first. Requests that the router refuses temporarily (429, 503) do not count."""
    page_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Longest time for one page, including all tries and the waits between them."""
    silence_timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """Longest time without receiving a byte of an answer."""
    max_wait_s: Annotated[float, Field(gt=0)] = 90.0
    """A page fails if the router asks for a longer wait (`Retry-After`) than this."""


class JobSettings(Frozen):
    """Jobs: documents that are read in the background. They are stored in the ledger's database and read by any service
    that is free."""

    running: Annotated[int, Field(ge=1, le=64)] = 2
    """Jobs that one service process reads concurrently."""
    turn_s: Annotated[float, Field(ge=0)] = 60.0
    """A job that has run for so long yields its place between two pages, and continues at its next turn, if a tenant
    with fewer running jobs waits. A tenant with two more places than a waiting tenant yields one immediately."""
    max_open_per_tenant: Annotated[int, Field(ge=1)] = 100
    """Queued and running jobs of one tenant; more are refused with 429."""
    lease_s: Annotated[float, Field(ge=1, le=600)] = 15.0
    """A job is taken over, by another service or by the same one after a restart, when its service has sent no
    heartbeat for so long. The clocks of the services' machines must agree to within a fraction of it."""
    poll_s: Annotated[float, Field(gt=0, le=60)] = 2.0
    """How often a service looks for jobs that other services accepted or abandoned."""
    settle_s: Annotated[float, Field(ge=0, le=60)] = 5.0
    """How long a service waits after taking over a job, until the ledger contains what the former service's last
    requests were charged. Pages that are read again are then not charged twice."""
    keep_documents_s: Annotated[float, Field(ge=0)] = 0.0
    """How long a document is stored after its job has ended."""
    keep_results_s: Annotated[float, Field(ge=1)] = 7 * 86_400.0
    """How long a job that has ended, and its results, are stored."""
    max_age_s: Annotated[float, Field(ge=1)] = 7 * 86_400.0
    """A job that has not ended by this age fails."""


class OcrSettings(Frozen):
    """The OCR service, which turns documents into text. It runs beside the router and is one of its clients."""

    enabled: bool = False
    """Whether `serving up` starts it."""
    host: str = "127.0.0.1"
    """Address that the service listens on and that routers reach it at; `auto` is the node's own address."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port of the service; 0 picks a free one, which routers learn from the directory."""
    allow_unauthenticated: bool = False
    """Required to bind the service to a non-loopback address while its router runs without API keys."""
    num_replicas: Annotated[int, Field(ge=1, le=100)] = 1
    cpus_per_replica: Annotated[float, Field(ge=0)] = 0.5
    resources_per_replica: dict[Name, Amount] = Field(default_factory=dict)
    """Custom Ray resources that a service needs, to place services on the nodes that offer them."""
    router_url: str | None = None
    """Address of the router, `http(s)://host:port`; None is the router of the same stack."""
    directory: Path = Field(default=Path("data/ocr"), validate_default=True)
    """Folder of documents while they are read, including those of jobs. Services that share a database must share this
    folder as well."""
    secret: SecretStr | None = None
    """Secret that encrypts the API keys of jobs, authenticates services and routers to one another, and signs the
    tenant of a request that a router relays. Both must have the same one; otherwise a page that has to be read again is
    charged again, and the service asks the router whose key a request has. None creates the file `secret` in
    `directory`."""
    playground: bool = True
    """Whether to serve the playground at `/`."""
    max_document_bytes: Annotated[int, Field(ge=1024)] = 100 * 2**20
    """Largest upload. A document inside JSON is limited by `router.limits.max_body_bytes` first. The slowest permitted
    upload rate is `router.limits.min_body_bytes_per_s`."""
    max_documents: Annotated[int, Field(ge=1)] = 32
    """Documents that one process receives or reads concurrently, not counting jobs; more are refused with 503."""
    max_submissions: Annotated[int, Field(ge=1)] = 32
    """Jobs whose documents one process receives concurrently; more are refused with 503."""
    tenant_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """The fraction of what other tenants leave of `max_documents`, `max_submissions`, `max_stored_bytes`,
    `max_result_bytes` and the memory for JSON bodies that one tenant may hold; more is refused with 429. Without API
    keys there is one tenant, which may hold everything."""
    max_stored_bytes: Annotated[int, Field(ge=1024)] = 8 * 2**30
    """Bytes of documents in `directory`, including those of services that share it; more are refused with 503
    `storage_full`."""
    max_result_bytes: Annotated[int, Field(ge=1024)] = 8 * 2**30
    """Bytes of job results in the database. Beyond it new jobs are refused with 503 `storage_full`; jobs that were
    accepted before are completed."""
    pages_in_parallel: Annotated[int, Field(ge=1, le=256)] = 8
    """Pages of one document that are sent to the router concurrently."""
    max_figures: Annotated[int, Field(ge=0, le=1000)] = 32
    """Figures cut out of each page when a request asks for images."""
    max_figure_bytes: Annotated[int, Field(ge=0)] = 32 * 2**20
    """Bytes of all figures of one document together; further figures are omitted from the answer."""
    markdown_prompt: str = "<|grounding|>Convert the document to markdown."
    """Prompt for the formats `markdown` and `layout` when the request has none."""
    text_prompt: str = "Free OCR."
    remote_documents: RemoteImageSettings = RemoteImageSettings()
    """Fetching documents by URL: off by default, with the same rules as the router's remote images."""
    render: RenderSettings = RenderSettings()
    read: ReadSettings = ReadSettings()
    jobs: JobSettings = JobSettings()

    @property
    def secret_file(self) -> Path:
        """The file of the secret when the settings name none. The first service creates it."""
        return self.directory / "secret"

    @field_validator("directory")
    @classmethod
    def _resolve(cls, directory: Path) -> Path:
        """Make paths absolute: replicas run in another working directory than the command that read the settings."""
        return directory.expanduser().absolute()

    @field_validator("router_url")
    @classmethod
    def _check_url(cls, url: str | None) -> str | None:
        if url is not None and not url.startswith(("http://", "https://")):
            raise ValueError("must begin with http:// or https://")
        return url.rstrip("/").removesuffix("/v1") if url is not None else None
