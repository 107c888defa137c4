"""Assembles, starts and stops the parts of one OCR service process."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Collection, Iterator, Mapping

from starlette.requests import Request

from serving.billing.database import Database
from serving.errors import ServingError
from serving.http.bodies import discard_body
from serving.ocr.api.uploads import UploadReceiver
from serving.ocr.jobs.database import JobDatabase
from serving.ocr.jobs.key_sealing import KeySealer
from serving.ocr.jobs.leases import JobLeases
from serving.ocr.jobs.runner import JobRunner
from serving.ocr.jobs.store import JobStore
from serving.ocr.jobs.sweeper import JobSweeper
from serving.ocr.limits.shares import Refusals, Shares
from serving.ocr.limits.storage import Storage
from serving.ocr.reading.documents import Pipeline
from serving.ocr.reading.pages import PageReader
from serving.ocr.reading.quotes import Quoter
from serving.ocr.reading.router_client import Caller, Callers, Routers
from serving.ocr.rendering.pool import Renderer
from serving.ocr_api.signed_tenant import TENANT_HEADER, SignedRequest, SignedTenant, TenantSigner
from serving.settings.stack import Settings
from serving.telemetry import catalogue
from serving.telemetry.ocr_metrics import OcrMetrics
from serving.telemetry.router_metrics import Reading

_DOCUMENTS = Refusals(
    own_code="too_many_documents",
    own_message="You have as many open documents as one tenant may have; wait for one to end, or submit jobs.",
    full_code="overloaded",
    full_message="The service is reading as many documents as it can; try again shortly.",
    retry_after_s=2.0,
)
_SUBMISSIONS = Refusals(
    own_code="too_many_submissions",
    own_message="You are submitting as many jobs at once as one tenant may; wait until one has been accepted.",
    full_code="overloaded",
    full_message="The service is receiving as many jobs as it can; try again shortly.",
    retry_after_s=2.0,
)


class OcrService:
    """Everything behind the routes."""

    def __init__(self, settings: Settings, routers: Routers) -> None:
        """Assemble the parts; raises SettingsError when the secret cannot be read or created."""
        self.settings = settings
        ocr = settings.ocr
        self.service_id = uuid.uuid4().hex[:12]
        self.documents = Shares(ocr.max_documents, ocr.tenant_share, _DOCUMENTS)
        """Slots for documents whose clients are waiting."""
        self.submissions = Shares(ocr.max_submissions, ocr.tenant_share, _SUBMISSIONS)
        """Slots for job documents that are being received."""
        self.metrics = OcrMetrics(self._read_gauges)
        self.renderer = Renderer(ocr.render)
        self.storage = Storage(ocr)
        self.uploads = UploadReceiver(ocr, settings.router.limits, self.storage)
        self.key_sealer = KeySealer(ocr.secret, ocr.directory)
        self._tenant_signer = TenantSigner(ocr.secret, ocr.secret_file)
        self.callers = Callers(routers, self.key_sealer.signer.sign)
        self._reader = PageReader(
            routers.choose,
            ocr.read,
            # One for each page that can be in flight, so that no tenant waits for another's connections.
            max_connections=(ocr.max_documents + ocr.jobs.running) * ocr.pages_in_parallel,
            sign_credit=self.key_sealer.signer.sign,
        )
        self.pipeline = Pipeline(self.renderer, self._reader, ocr, self.metrics)
        self.quoter = Quoter(self.renderer, self.callers, ocr)
        self._database = Database(settings.billing)
        migrates = settings.billing.migrate_on_start
        jobs = JobDatabase(self._database, ocr.jobs.keep_results_s, migrates=migrates)
        self.store = JobStore(jobs, ocr.jobs.max_open_per_tenant)
        leases = JobLeases(jobs, ocr.jobs.lease_s, self.service_id)
        self.sweeper = JobSweeper(jobs, ocr, settings.router.limits, self.storage)
        self.runner = JobRunner(leases, self.sweeper, self.pipeline, self.key_sealer, ocr)
        self._running = contextlib.AsyncExitStack()

    async def start(self) -> None:
        """Must run inside the event loop that serves.

        Raises:
            OSError: a folder cannot be used.
        """
        self._running.push_async_callback(self._database.close)
        self.storage.make_folders()
        await self.storage.look(_find_nobody)
        await self.uploads.start()
        self._running.push_async_callback(self.uploads.close)
        self._running.push_async_callback(self.renderer.close)
        await self._running.enter_async_context(self.callers)
        await self._running.enter_async_context(self._reader)
        self.runner.start()

    async def identify(self, request: Request) -> Caller:
        """The tenant behind a request.

        Raises:
            ServingError: the router refuses the key, or no router answers.
        """
        authorization = request.headers.get("authorization")
        return await self.callers.identify(authorization, self._read_signed_tenant(request))

    def _read_signed_tenant(self, request: Request) -> SignedTenant | None:
        """The tenant that a router of this stack has signed for this request; None without a valid signature."""
        value = request.headers.get(TENANT_HEADER)
        if value is None:
            return None
        bound = SignedRequest(
            request.method,
            request.scope["path"],
            request.headers.get("x-request-id", ""),
            request.headers.get("authorization", ""),
        )
        return self._tenant_signer.read(value, bound, time.time())

    @contextlib.asynccontextmanager
    async def admitting(self, request: Request, caller: Caller, *, is_job: bool = False) -> AsyncIterator[None]:
        """Hold a slot for a request whose body has not been read yet.

        Raises:
            RateLimitError: the tenant has used its share of the slots, or of the space for documents or results.
            OverloadedError: all of it is used.
        """
        with (self.submissions if is_job else self.documents).hold(caller) as held:
            try:
                self.storage.check_documents(caller)
                if is_job:
                    self.storage.check_results(caller)
                held.take(1)
            except ServingError:
                # Otherwise a client that is still sending would see a reset instead of the answer.
                await discard_body(request.receive, self.settings.router.limits)
                raise
            yield

    async def close(self, drain_s: float) -> None:
        """Stop; pages of jobs in flight have `drain_s` to finish, unfinished jobs are left to other services."""
        await self.runner.close(drain_s)
        await self._running.aclose()

    def _read_gauges(self) -> Iterator[Reading]:
        yield catalogue.OCR_OPEN, (), float(self.documents.num_held)
        yield catalogue.OCR_RENDER_QUEUE, (), float(self.renderer.num_waiting)
        yield catalogue.OCR_RENDER_CPU, (), self.renderer.cpu_s
        yield catalogue.OCR_STORAGE, ("documents",), float(self.storage.num_document_bytes)
        yield catalogue.OCR_STORAGE, ("results",), float(self.storage.num_result_bytes)
        for kind, ratio in self.storage.used_ratios.items():
            yield catalogue.OCR_STORAGE_USED, (kind,), ratio
        for status, number in self.runner.counts.items():
            yield catalogue.OCR_JOBS, (status,), float(number)
        yield catalogue.OCR_JOB_LAG, (), self.runner.lag_s


async def _find_nobody(job_ids: Collection[str]) -> Mapping[str, str]:
    """For the scan at startup, which must count files before the database may be reachable; owners follow later."""
    return {}
