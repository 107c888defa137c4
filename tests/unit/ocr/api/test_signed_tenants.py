"""Whose request it is, signed by the router: nothing else makes a service believe it.

The service's own router is an address where nobody answers, so what it does not believe is answered with 503.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from support.ocr_service import build_service_settings, run_host
from support.papers import write_pdf
from support.router_stack import Engine, RunningRouter, answers, build_settings, dead_replica, run_router

from serving.cluster.directory import ServiceRecord
from serving.ocr_api.signed_tenant import TENANT_HEADER, VALID_S, SignedRequest, SignedTenant, TenantSigner
from serving.settings.ocr import OcrSettings
from unit.ocr.jobs.test_jobs import make_keys

PATH = "/v1/ocr/jobs"
REQUEST = SignedRequest("GET", PATH, "request-1", "Bearer sk-acme")
NOW_S = 1_800_000_000
TENANT = SignedTenant("acme", "key-1", NOW_S + VALID_S)


@dataclass
class Stack:
    router: RunningRouter
    service: httpx.AsyncClient
    """Straight to the OCR service."""
    acme: dict[str, str]
    other: dict[str, str]
    folder: Path

    def sign(self, tenant_id: str = "acme", valid_s: float = VALID_S, **request: str) -> dict[str, str]:
        """Headers of a request that the stack's router could have sent for acme's key."""
        signer = TenantSigner(None, self.folder / "ocr" / "secret")
        bound = replace(SignedRequest("GET", PATH, "request-1", self.acme["authorization"]), **request)
        signed = signer.sign(SignedTenant(tenant_id, "key-1", int(time.time() + valid_s)), bound)
        assert signed is not None
        return {TENANT_HEADER: signed, "x-request-id": "request-1", **self.acme}


@contextlib.asynccontextmanager
async def run_stack(folder: Path, *, router_ocr: dict[str, Any] | None = None, **ocr: Any) -> AsyncIterator[Stack]:
    keys_file, (acme, other) = make_keys(folder, "acme", "other")
    shared = {"enabled": True, "directory": folder / "ocr", **ocr}
    settings = build_settings(keys_file=keys_file).model_copy(
        update={"ocr": OcrSettings.model_validate(shared | (router_ocr or {}))}
    )
    with dead_replica() as dead:
        port = int(dead.base_url.rpartition(":")[2])
        async with (
            run_router(settings=settings) as router,
            run_host(build_service_settings(folder, **ocr), port) as (host, service),
        ):
            router.app.follow_services((host.record,))
            yield Stack(router, service, acme, other, folder)


def is_trusted(answer: httpx.Response) -> bool:
    if answer.status_code != 200:
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "router_unreachable")
    return answer.status_code == 200


async def test_the_router_says_whose_request_it_is_and_is_not_asked_back(tmp_path: Path) -> None:
    pdf = write_pdf(tmp_path / "x.pdf", 1, (50, 50)).read_bytes()
    async with run_stack(tmp_path) as stack:
        form: dict[str, Any] = {"data": {"model": "nano"}, "files": {"file": ("x", pdf)}}
        submitted = await stack.router.client.post("/v1/openai/ocr/jobs/", **form, headers=stack.acme)
        assert submitted.status_code == 202, submitted.text
        path = f"{PATH}/{submitted.json()['id']}"
        assert (await stack.router.client.get(path, headers=stack.acme)).status_code == 200
        assert (await stack.router.client.get(path, headers=stack.other)).status_code == 404
        assert (await stack.router.client.get(path)).status_code == 401
        # Straight to the service a client is known by its key, about which no router answers here.
        assert not is_trusted(await stack.service.get(path, headers=stack.acme))


async def test_a_client_cannot_name_its_tenant_through_the_router(tmp_path: Path) -> None:
    async with run_stack(tmp_path) as stack, Engine(answers(b"{}")) as recorder:
        stolen = stack.sign()
        listed = await stack.router.client.get(PATH, headers={**stolen, **stack.other})
        assert listed.status_code == 200, "as a request of the key's own tenant"
        stack.router.app.follow_services((ServiceRecord("recorder", recorder.record.base_url),))
        await stack.router.client.get(PATH, headers={**stolen, **stack.other})
        (asked,) = recorder.asked
        signer = TenantSigner(None, tmp_path / "ocr" / "secret")
        bound = SignedRequest("GET", PATH, "request-1", stack.other["authorization"])
        found = signer.read(asked.headers[TENANT_HEADER], bound, time.time())
        assert found is not None
        assert found.tenant_id == "other"


async def test_pages_for_everybody_are_nobodys(tmp_path: Path) -> None:
    async with run_stack(tmp_path) as stack, Engine(answers(b"page")) as recorder:
        stack.router.app.follow_services((ServiceRecord("recorder", recorder.record.base_url),))
        await stack.router.client.get("/", headers=stack.sign())
        assert TENANT_HEADER not in recorder.asked[0].headers


async def test_only_the_request_that_was_signed_is_believed(tmp_path: Path) -> None:
    async with run_stack(tmp_path) as stack:
        good = stack.sign()
        assert is_trusted(await stack.service.get(PATH, headers=good))
        assert is_trusted(await stack.service.get(PATH + "/", headers=good)), "the same path"
        for wrong in (
            stack.sign(valid_s=-1),
            stack.sign(valid_s=3600),
            stack.sign(method="POST"),
            stack.sign(path="/v1/ocr/jobs/job-1"),
            stack.sign(request_id="request-2"),
            stack.sign(authorization=stack.other["authorization"]),
            stack.sign(authorization=""),
            {**good, **stack.other},
            {**good, "x-request-id": "request-2"},
            {name: value for name, value in good.items() if name != "x-request-id"},
            {**good, TENANT_HEADER: stack.sign("other")[TENANT_HEADER].partition(".")[0] + "." + "0" * 64},
            {**good, TENANT_HEADER: good[TENANT_HEADER].partition(".")[0]},
            {**good, TENANT_HEADER: "." + good[TENANT_HEADER].partition(".")[2]},
            {**good, TENANT_HEADER: "é"},
        ):
            headers = [(name.encode(), value.encode("latin-1")) for name, value in wrong.items()]
            assert not is_trusted(await stack.service.get(PATH, headers=headers)), wrong
        assert not is_trusted(await stack.service.get(f"{PATH}/job-1", headers=good))
        twice = await stack.service.get(PATH, headers=[*good.items(), (TENANT_HEADER, "x")])
        assert twice.status_code == 400


async def test_without_a_shared_secret_nothing_is_signed_or_believed(tmp_path: Path) -> None:
    async with run_stack(tmp_path, router_ocr={"directory": tmp_path / "elsewhere"}) as stack:
        assert not is_trusted(await stack.router.client.get(PATH, headers=stack.acme))
    (tmp_path / "two").mkdir()
    async with run_stack(tmp_path / "two", router_ocr={"secret": "another"}) as stack:
        assert not is_trusted(await stack.router.client.get(PATH, headers=stack.acme))
    (tmp_path / "three").mkdir()
    async with run_stack(tmp_path / "three", secret="shared") as stack:
        assert is_trusted(await stack.router.client.get(PATH, headers=stack.acme))
        assert not (tmp_path / "three" / "ocr" / "secret").exists()


async def test_a_secret_that_was_replaced_is_used_at_once(tmp_path: Path) -> None:
    async with run_stack(tmp_path) as stack:
        former = stack.sign()
        assert is_trusted(await stack.router.client.get(PATH, headers=stack.acme))
        (tmp_path / "ocr" / "secret").write_bytes(b"another secret than before")
        assert is_trusted(await stack.router.client.get(PATH, headers=stack.acme))
        assert not is_trusted(await stack.service.get(PATH, headers=former))
        (tmp_path / "ocr" / "secret").unlink()
        assert not is_trusted(await stack.router.client.get(PATH, headers=stack.acme))


@pytest.mark.parametrize("secret", [None, SecretStr("")])
def test_no_secret_and_an_empty_one_sign_nothing(secret: SecretStr | None, tmp_path: Path) -> None:
    signer = TenantSigner(secret, tmp_path / "secret")
    (tmp_path / "secret").write_bytes(b"")
    signed = TenantSigner(SecretStr("shared"), tmp_path).sign(TENANT, REQUEST)
    assert signed is not None
    assert signer.sign(TENANT, REQUEST) is None
    assert signer.read(signed, REQUEST, NOW_S) is None
    assert signer.read("", REQUEST, NOW_S) is None


def test_a_signature_ends_when_it_says(tmp_path: Path) -> None:
    signer = TenantSigner(SecretStr("shared"), tmp_path)
    signed = signer.sign(TENANT, REQUEST)
    assert signed is not None
    assert signer.read(signed, REQUEST, NOW_S) == TENANT
    assert signer.read(signed, REQUEST, NOW_S + VALID_S - 1) == TENANT
    assert signer.read(signed, REQUEST, NOW_S + VALID_S) is None
