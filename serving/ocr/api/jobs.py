"""`/v1/ocr/jobs`: documents that are read in the background."""

from __future__ import annotations

import hashlib
import re

import orjson
from starlette.requests import Request

from serving.errors import InvalidRequestError, JobNotFoundError
from serving.http.disconnects import ClientPresence
from serving.http.reply import Reply
from serving.ocr.api.service import OcrService
from serving.ocr.api.uploads import Submission
from serving.ocr.jobs.key_sealing import JobSecrets
from serving.ocr.jobs.model import JobRow, NewJob, new_job_id
from serving.ocr.reading.options import options_to_json, without_stream
from serving.ocr.reading.results import build_document
from serving.ocr.reading.router_client import Caller
from serving.ocr_api.page_ranges import select_pages
from serving.ocr_api.shapes import JobList, JobPages

_MAX_JOBS = 100
_MAX_PAGES = 1000
_DEFAULT_LIMIT = 20
_IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")


class JobsRoute:
    """Serves callers whose key the router accepts, each with its own tenant's jobs only."""

    def __init__(self, service: OcrService) -> None:
        self._service = service

    async def submit(self, request: Request, reply: Reply) -> None:
        """Receive a document, and answer with the job once it is stored durably."""
        service = self._service
        caller = await self._service.identify(request)
        idempotency_key = request.headers.get("idempotency-key")
        if idempotency_key is not None and not _IDEMPOTENCY_KEY.fullmatch(idempotency_key):
            raise InvalidRequestError("Idempotency-Key must be 1 to 255 printable characters.", param="idempotency-key")
        async with (
            service.admitting(request, caller, is_job=True),
            service.uploads.receive(request, caller) as submission,
            ClientPresence(request.receive),
        ):
            job = await self._keep(submission, caller, idempotency_key)
        service.runner.wake()
        await reply.send_body(202, job.build_job().to_json())

    async def _keep(self, submission: Submission, caller: Caller, idempotency_key: str | None) -> JobRow:
        service = self._service
        options = without_stream(submission.options)
        options_json = options_to_json(options)
        digest = hashlib.sha256(
            orjson.dumps([submission.digest, options_json], option=orjson.OPT_SORT_KEYS)
        ).hexdigest()
        if idempotency_key is not None:
            try:
                return await service.store.find_repeated(caller.owner, idempotency_key, digest)
            except JobNotFoundError:
                pass
        document = await service.renderer.open(submission.file, caller.owner, options.password)
        pages = select_pages(
            options.pages, document.num_pages, service.settings.ocr.render.max_pages, options.page_base
        )
        new = NewJob(
            owner=caller.owner,
            model=options.model,
            options=options_json,
            document=build_document(document, submission.size_bytes),
            pages=pages,
            sealed_key=service.key_sealer.seal(JobSecrets(caller.api_key, options.password)),
            digest=digest,
            idempotency_key=idempotency_key,
        )
        job_id = new_job_id()
        file = service.runner.find_file(job_id)
        # The file first: a service may start to read the job as soon as it is in the database.
        await service.storage.move(submission.file, file)
        job = None
        try:
            job = await service.store.add(job_id, new)
        finally:
            if job is None or job.job_id != job_id:
                await service.runner.remove_file(job_id)
        service.metrics.see_document(document.format, "job")
        return job

    async def list_jobs(self, request: Request, reply: Reply) -> None:
        caller = await self._service.identify(request)
        limit = _read_count(request, "limit", _DEFAULT_LIMIT, 1, _MAX_JOBS)
        jobs, has_more = await self._service.store.list_jobs(caller.owner, limit, request.query_params.get("after"))
        await reply.send_body(200, JobList(data=tuple(job.build_job() for job in jobs), has_more=has_more).to_json())

    async def show(self, request: Request, reply: Reply) -> None:
        caller = await self._service.identify(request)
        job = await self._service.store.find(request.path_params["job_id"], caller.owner)
        await reply.send_body(200, job.build_job().to_json())

    async def list_pages(self, request: Request, reply: Reply) -> None:
        caller = await self._service.identify(request)
        after = _read_count(request, "after", 0, 0, 2**31)
        limit = _read_count(request, "limit", 100, 1, _MAX_PAGES)
        job_id = request.path_params["job_id"]
        pages, has_more = await self._service.store.list_pages(job_id, caller.owner, limit, after)
        await reply.send_body(200, JobPages(data=tuple(pages), has_more=has_more).to_json())

    async def cancel(self, request: Request, reply: Reply) -> None:
        caller = await self._service.identify(request)
        service = self._service
        job = await service.store.cancel(request.path_params["job_id"], caller.owner)
        service.runner.abandon(job.job_id)
        if not service.settings.ocr.jobs.keep_documents_s:
            await service.runner.remove_file(job.job_id)
        await reply.send_body(200, job.build_job().to_json())

    async def delete(self, request: Request, reply: Reply) -> None:
        """Delete a job and everything that belongs to it, whether it has ended or not."""
        caller = await self._service.identify(request)
        service = self._service
        job_id = request.path_params["job_id"]
        await service.store.delete(job_id, caller.owner)
        service.runner.abandon(job_id)
        await service.runner.remove_file(job_id)
        await reply.send_empty(204)


def _read_count(request: Request, name: str, usual: int, least: int, most: int) -> int:
    text = request.query_params.get(name)
    if text is None:
        return usual
    if not re.fullmatch(r"[0-9]{1,10}", text) or not least <= int(text) <= most:
        raise InvalidRequestError(f"{name} must be a whole number from {least} to {most}.", param=name)
    return int(text)
