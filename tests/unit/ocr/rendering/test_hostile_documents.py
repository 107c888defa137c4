"""Documents that nobody should send, over HTTP: clear refusals, bounded memory and time, and a service that goes on."""

from __future__ import annotations

import base64
import io
import time
import zipfile
import zlib
from pathlib import Path
from typing import Any

import httpx
import psutil
from support.ocr_service import RunningService, run_service
from support.papers import A4, encrypted_pdf, huge_png, office_file, write_image, write_pdf

METRE = 72 / 0.0254
"""In points."""


def raw_pdf(*objects: bytes, root: bytes = b"") -> bytes:
    """A page of 100 x 100 points with more objects, from the fourth on, and more in its root."""
    body = b"%PDF-1.7\n"
    places = []
    fixed = (
        b"<</Type/Catalog/Pages 2 0 R" + root + b">>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 100 100]/Contents 4 0 R>>",
    )
    for number, content in enumerate((*fixed, *objects), 1):
        places.append(len(body))
        body += b"%d 0 obj%b\nendobj\n" % (number, content)
    table = b"xref\n0 %d\n0000000000 65535 f \n" % (len(places) + 1)
    table += b"".join(b"%010d 00000 n \n" % place for place in places)
    return body + table + b"trailer<</Size %d/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF" % (len(places) + 1, len(body))


def stream(data: bytes, more: bytes = b"") -> bytes:
    return b"<</Length %d%b>>stream\n%b\nendstream" % (len(data), more, data)


def scripted_pdf() -> bytes:
    """Runs a script when it is opened, starts a program, and has a file inside."""
    root = b"/OpenAction 5 0 R/Names<</EmbeddedFiles<</Names[(x.exe) 6 0 R]>>/JavaScript<</Names[(a) 5 0 R]>>>>"
    script = b"<</Type/Action/S/JavaScript/JS(app.alert\\(1\\); this.submitForm\\('http://127.0.0.1:1/'\\);)>>"
    inside = b"<</Type/Filespec/F(x.exe)/EF<</F 7 0 R>>>>"
    return raw_pdf(stream(b"0 0 10 10 re f"), script, inside, stream(b"MZ" * 100, b"/Type/EmbeddedFile"), root=root)


def zip_bomb_pdf() -> bytes:
    """A page whose content is 640 MB of zeros in 3 MB."""
    packer = zlib.compressobj(1)
    packed = b"".join(packer.compress(bytes(2**24)) for _ in range(40)) + packer.flush()
    return raw_pdf(stream(packed, b"/Filter/FlateDecode"))


def polyglot() -> bytes:
    """A PDF that is a ZIP archive as well."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x.html", "<script>alert(1)</script>")
    return raw_pdf(stream(b"")) + buffer.getvalue()


def jpeg_then_pdf(folder: Path) -> bytes:
    return write_image(folder / "x.jpg", "JPEG").read_bytes() + raw_pdf(stream(b""))


async def refused(service: RunningService, data: bytes, **fields: Any) -> tuple[int, str]:
    answer = await service.upload(data, **fields)
    return answer.status_code, answer.json()["error"]["code"]


async def failed_page(service: RunningService, data: bytes, **fields: Any) -> str:
    """The code of the first page's error; the answer as a whole is fine."""
    answer = await service.upload(data, **fields)
    assert answer.status_code == 200, answer.text
    (page, *_) = answer.json()["pages"]
    assert page["status"] == "failed"
    return str(page["error"]["code"])


async def test_documents_that_cannot_be_read_are_refused_as_a_whole(tmp_path: Path) -> None:
    async with run_service(tmp_path) as service:
        assert await refused(service, encrypted_pdf()) == (400, "encrypted_document")
        assert await refused(service, b"%PDF-1.7\n" + b"\x00garbage" * 500) == (400, "damaged_document")
        assert await refused(service, office_file()) == (400, "unsupported_document")
        assert await refused(service, b"MZ\x90\x00" + bytes(2000)) == (400, "unsupported_document")
        assert await refused(service, b"<html><script>alert(1)</script>") == (400, "unsupported_document")
        assert service.engine.asked == []
        assert not list((tmp_path / "ocr" / "uploads").iterdir())


async def test_ten_thousand_pages_are_refused_and_some_of_them_read(tmp_path: Path) -> None:
    pdf = write_pdf(tmp_path / "x.pdf", 10_000, (100, 100)).read_bytes()
    async with run_service(tmp_path) as service:
        assert await refused(service, pdf) == (400, "invalid_pages")
        answer = await service.upload(pdf, pages="1,10000")
        assert [page["number"] for page in answer.json()["pages"]] == [1, 10_000]
        assert await refused(service, pdf, pages="10001") == (400, "invalid_pages")


async def test_pages_that_are_too_large_are_read_at_the_resolution_that_fits(tmp_path: Path) -> None:
    hall = write_pdf(tmp_path / "hall.pdf", 1, (20 * METRE, 20 * METRE)).read_bytes()
    async with run_service(tmp_path, render={"max_page_pixels": 10**7}) as service:
        answer = await service.upload(hall)
        (page,) = answer.json()["pages"]
        assert page["status"] == "completed"
        assert page["dimensions"]["dpi"] == 4
        assert [warning["code"] for warning in page["warnings"]] == ["resolution_reduced"]
        service.engine.asked.clear()
        assert await failed_page(service, huge_png(30_000)) == "page_too_large"
        assert service.engine.asked == []


async def test_scripts_are_not_run_and_files_inside_not_opened(tmp_path: Path) -> None:
    async with run_service(tmp_path) as service:
        answer = await service.upload(scripted_pdf())
        assert [page["status"] for page in answer.json()["pages"]] == ["completed"]


async def test_a_file_that_is_two_things_is_what_it_begins_with(tmp_path: Path) -> None:
    async with run_service(tmp_path) as service:
        assert (await service.upload(polyglot())).json()["document"]["format"] == "pdf"
        assert (await service.upload(jpeg_then_pdf(tmp_path))).json()["document"]["format"] == "jpeg"


async def test_a_bomb_ends_with_its_worker(tmp_path: Path) -> None:
    """In its memory and its time; the service is none the heavier, and reads the next document."""
    render = {"page_timeout_s": 10, "worker_memory_bytes": 384 * 2**20}
    async with run_service(tmp_path, render=render) as service:
        before = psutil.Process().memory_info().rss
        started_s = time.monotonic()
        answer = await service.upload(zip_bomb_pdf())
        assert answer.status_code in (200, 400)
        assert time.monotonic() - started_s < 60
        assert psutil.Process().memory_info().rss - before < 300 * 2**20
        fine = await service.upload(write_pdf(tmp_path / "fine.pdf", 1, A4).read_bytes())
        assert fine.json()["pages"][0]["status"] == "completed"


BODIES = [
    (b"{", "invalid_json"),
    (b"[]", "invalid_json"),
    (b'{"model": "nano"}', None),
    (b'{"model": "nano", "document": {"type": "url"}}', None),
    (b'{"model": "nano", "document": {"type": "file", "file": "%%%"}}', None),
    (b'{"model": "nano", "document": {"type": "file", "file": ""}}', None),
    (b'{"model": "nano", "document": {"type": "document_url", "document_url": "http://169.254.169.254/"}}', None),
    (b'{"model": "nano", "document": {"type": "document_url", "document_url": "file:///etc/passwd"}}', None),
    (b'{"model": "nano", "document": {"type": "document_url", "document_url": "data:text/plain,x"}}', None),
    (b'{"model": 3, "document": {"type": "file", "file": "AAAA"}}', None),
    (b'{"model": "nano", "mode": "huge", "document": {"type": "file", "file": "AAAA"}}', None),
    (b'{"model": "nano", "dpi": 1e9, "document": {"type": "file", "file": "AAAA"}}', None),
    (b'{"model": "nano", "pages": 1, "document": {"type": "file", "file": "AAAA"}}', None),
    (b'{"model": "nano", "stream": "yes", "document": {"type": "file", "file": "AAAA"}}', None),
    (b'{"model": "nano", "unknown": 1, "document": {"type": "file", "file": "AAAA"}}', None),
    (b'{"a":' + b"[" * 500 + b"]" * 500 + b"}", "json_too_deep"),
]


async def test_bodies_that_are_wrong_are_the_clients_fault(tmp_path: Path) -> None:
    async with run_service(tmp_path) as service:
        for body, code in BODIES:
            answer = await service.client.post("/v1/ocr", content=body, headers={"content-type": "application/json"})
            assert answer.status_code == 400, (body, answer.text)
            assert answer.json()["error"]["type"] == "invalid_request_error"
            assert code is None or answer.json()["error"]["code"] == code


async def test_forms_that_are_wrong_are_the_clients_fault(tmp_path: Path) -> None:
    async with run_service(tmp_path, max_document_bytes=200_000) as service:
        post = service.client.post

        async def raw(content: bytes, kind: str = "multipart/form-data; boundary=x") -> httpx.Response:
            return await post("/v1/ocr", content=content, headers={"content-type": kind})

        part = b'--x\r\ncontent-disposition: form-data; name="file"; filename="x"\r\n\r\nAA'
        assert (await raw(part)).status_code == 400
        assert (await raw(part + b"\r\n" + part + b"\r\n--x--\r\n")).status_code == 400
        assert (await raw(b"nothing of the kind")).status_code == 400
        assert (await raw(part, "multipart/form-data")).status_code == 400
        assert (await raw(part, "text/plain")).status_code == 400
        assert (await raw(b"--x\r\nlong: " + b"a" * 50_000)).status_code == 400
        assert (await post("/v1/ocr", data={"model": "nano"}, files={"other": b"x"})).status_code == 400
        assert (await post("/v1/ocr", data={"model": "n" * 20_000}, files={"file": b"x"})).status_code == 400
        many = {f"field{n}": "x" for n in range(40)}
        assert (await post("/v1/ocr", data=many, files={"file": b"x"})).status_code == 400
        assert (await service.upload(bytes(300_000))).status_code == 413
        assert not list((tmp_path / "ocr" / "uploads").iterdir())


async def test_routes_that_are_not_there(tmp_path: Path) -> None:
    async with run_service(tmp_path) as service:
        client = service.client
        assert (await client.get("/v1/ocr")).status_code == 405
        assert (await client.get("/v1/ocr")).headers["allow"] == "POST"
        assert (await client.get("/v1/other")).json()["error"]["code"] == "not_found"
        assert (await client.get("/v1/ocr/jobs/none")).json()["error"]["code"] == "job_not_found"
        for query in ("limit=0", "limit=x", "limit=99999999999", "after=job-none"):
            assert (await client.get(f"/v1/ocr/jobs?{query}")).status_code in (400, 404)
        picture = base64.b64encode(write_image(tmp_path / "x.png", "PNG").read_bytes()).decode()
        body = {"model": "nano", "stream": True, "document": {"type": "file", "file": picture}}
        assert (await client.post("/v1/ocr/jobs", json=body)).json()["error"]["param"] == "stream"
