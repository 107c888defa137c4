"""Usage, costs, quotes and scrape targets over HTTP, out of a ledger that requests have filled."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from support.request_pictures import encode_image, image_part, to_url
from support.router_stack import USAGE, Engine, answers, build_settings, chat_body, connect

from serving.cluster.directory import Snapshot
from serving.http.server import HttpServer
from serving.router.access.keys_file import KeysFile, make_key, write_keys
from serving.router.app import RouterApp
from serving.settings.billing import BillingSettings
from serving.settings.stack import Settings
from serving.settings.tenants import Tenant

ANSWER = orjson.dumps({"choices": [{"message": {"content": "a"}, "finish_reason": "stop"}], "usage": USAGE})
COST = Decimal("0.00008")  # 1,000 tokens at $0.03 and 500 at $0.10 per million


@dataclass
class Office:
    """A router with books, and the keys of two tenants and an admin."""

    client: httpx.AsyncClient
    app: RouterApp
    keys: dict[str, str] = field(default_factory=dict)

    async def get(self, who: str, path: str, **parameters: Any) -> httpx.Response:
        return await self.client.get(path, params=parameters, headers=self._headers(who))

    async def post(self, who: str, path: str, content: bytes) -> httpx.Response:
        return await self.client.post(path, content=content, headers=self._headers(who))

    def _headers(self, who: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self.keys[who]}"}

    async def settle(self) -> None:
        """All that was asked is in the database."""
        ledger = self.app.accounts.ledger
        assert ledger is not None
        assert await ledger.flush(20)


def build_keys(file: Path, **budgets: Decimal) -> dict[str, str]:
    tenants = {name: Tenant(monthly_budget=budgets.get(name)) for name in ("acme", "beta", "boss")}
    made = {name: make_key(name, created=datetime.now(UTC), is_admin=name == "boss") for name in tenants}
    write_keys(file, KeysFile(tenants=tenants, keys=tuple(record for _, record in made.values())))
    return {name: text for name, (text, _) in made.items()}


@contextlib.asynccontextmanager
async def run_office(folder: Path, **budgets: Decimal) -> AsyncIterator[Office]:
    keys = build_keys(folder / "keys.yaml", **budgets)
    billing = BillingSettings(directory=folder / "billing", flush_s=0.05, replica_hour_dollars={"nano": Decimal("3.6")})
    settings: Settings = build_settings(keys_file=folder / "keys.yaml").model_copy(update={"billing": billing})
    async with Engine(answers(ANSWER)) as engine:
        snapshot = Snapshot((1, 1), (engine.record,))
        app = RouterApp(settings, lambda: snapshot, has_ledger=True)
        server = HttpServer(app, host="127.0.0.1", port=0, drain_s=1, limits=settings.router.limits)
        await app.start()
        await server.start()
        try:
            async with connect(server.port, 30) as client:
                yield Office(client, app, keys)
        finally:
            await server.stop()
            await app.close()


@pytest.fixture
async def office(tmp_path: Path) -> AsyncIterator[Office]:
    async with run_office(tmp_path) as office:
        for who, number in (("acme", 3), ("beta", 1)):
            for _ in range(number):
                assert (await office.post(who, "/v1/chat/completions", chat_body())).status_code == 200
        assert (await office.post("acme", "/v1/chat/completions", chat_body(max_tokens=-1))).status_code == 400
        await office.settle()
        yield office


async def test_a_tenant_sees_its_own_usage_and_an_admin_everybodys(office: Office) -> None:
    own = (await office.get("acme", "/v1/usage", group_by="outcome")).json()
    assert own["total"]["num_requests"] == 4
    assert Decimal(own["total"]["cost_dollars"]) == 3 * COST
    everybodys = (await office.get("boss", "/v1/usage")).json()
    assert Decimal(everybodys["total"]["cost_dollars"]) == 4 * COST
    assert everybodys["total"]["completion_tokens"] == 4 * USAGE["completion_tokens"]
    betas = (await office.get("boss", "/v1/usage", tenant="beta")).json()
    assert betas["total"]["num_requests"] == 1
    assert (await office.get("acme", "/v1/usage", tenant="beta")).status_code == 403


async def test_usage_comes_as_csv_too(office: Office) -> None:
    answer = await office.get("acme", "/v1/usage", group_by="day,model,mode,key", format="csv")
    assert answer.headers["content-type"].startswith("text/csv")
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert sum(int(row["num_requests"]) for row in rows) == 4
    assert {row["model"] for row in rows} == {"nano", ""}  # one was refused before its model was read


@pytest.mark.parametrize(
    "parameters",
    [
        {"group_by": "shoe_size"},
        {"month": "2026-13"},
        {"since": "yesterday"},
        {"since": "2026-11-02", "until": "2026-11-01"},
        {"since": "1999-01-01"},
    ],
)
async def test_parameters_that_make_no_sense_are_named(office: Office, parameters: dict[str, str]) -> None:
    answer = await office.get("acme", "/v1/usage", **parameters)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] in parameters


async def test_openais_usage_is_for_admins(office: Office) -> None:
    path = "/v1/organization/usage/completions"
    assert (await office.get("acme", path, start_time=1)).status_code == 403
    assert (await office.get("boss", path)).json()["error"]["param"] == "start_time"
    assert (await office.get("boss", path, start_time="soon")).status_code == 400
    start = (await office.get("boss", "/v1/usage")).json()["start_time"]
    found = (await office.get("boss", path, start_time=start, group_by="model")).json()
    results = [result for bucket in found["data"] for result in bucket["results"]]
    assert sum(result["num_model_requests"] for result in results) >= 4
    assert sum(result["output_tokens"] for result in results) == 4 * USAGE["completion_tokens"]


async def test_what_the_stack_costs_is_for_admins(office: Office) -> None:
    assert (await office.get("acme", "/admin/costs")).status_code == 403
    office.app.tick()
    answer = await office.get("boss", "/admin/costs")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"


async def test_a_quote_holds_the_cost_and_runs_nothing(office: Office) -> None:
    page = image_part(to_url(encode_image("PNG", 64, 64)))
    messages = [{"role": "user", "content": [page, {"type": "text", "text": "Free OCR."}]}]
    found = (await office.post("acme", "/v1/quote", chat_body(messages=messages, max_tokens=500))).json()
    assert found["completion_tokens"]["most"] == 500
    dollars = {name: Decimal(text) for name, text in found["cost_dollars"].items()}
    assert 0 < dollars["least"] < dollars["most"]
    assert (await office.post("acme", "/v1/quote", b"{")).status_code == 400
    assert (await office.post("acme", "/v1/quote", b'{"model": "no", "prompt": "a"}')).status_code == 404
    await office.settle()
    assert (await office.get("acme", "/v1/usage")).json()["total"]["num_requests"] == 4


async def test_a_month_that_is_spent_refuses(tmp_path: Path) -> None:
    async with run_office(tmp_path, acme=Decimal("0.0001")) as office:
        first = await office.post("acme", "/v1/chat/completions", chat_body(max_tokens=500))
        assert (first.status_code, first.headers.get("x-budget-used-percent")) == (200, None)
        second = await office.post("acme", "/v1/chat/completions", chat_body(max_tokens=10))
        assert (second.status_code, second.headers["x-budget-used-percent"]) == (200, "80")
        third = await office.post("acme", "/v1/chat/completions", chat_body(max_tokens=10))
        assert (third.status_code, third.json()["error"]["code"]) == (429, "insufficient_quota")
        assert (await office.post("beta", "/v1/chat/completions", chat_body())).status_code == 200
        metrics = office.app.render_metrics().decode()
        (line,) = [line for line in metrics.splitlines() if line.startswith('serving_budget_used_ratio{tenant="acme"}')]
        assert float(line.split()[-1]) >= 0.8


async def test_scrape_targets_are_for_admins(office: Office) -> None:
    office.app.metrics_url = "http://10.0.0.1:9000/metrics"
    assert (await office.get("acme", "/metrics/targets")).status_code == 403
    groups = (await office.get("boss", "/metrics/targets")).json()
    assert [group["labels"]["job"] for group in groups] == ["router", "engine"]
    assert groups[0]["targets"] == ["10.0.0.1:9000"]


async def test_without_books_reports_say_so() -> None:
    app = RouterApp(build_settings())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        for path in ("/v1/usage", "/admin/costs", "/v1/organization/usage/completions?start_time=1790000000"):
            answer = await client.get(path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "ledger_unavailable"), path


async def test_a_new_router_knows_from_its_first_request_on_what_is_spent(tmp_path: Path) -> None:
    async with run_office(tmp_path, acme=Decimal("0.0001")) as office:
        assert (await office.post("acme", "/v1/chat/completions", chat_body(max_tokens=500))).status_code == 200
        await office.settle()
    async with run_office(tmp_path, acme=Decimal("0.0001")) as office:
        answer = await office.post("acme", "/v1/chat/completions", chat_body(max_tokens=500))
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "insufficient_quota")
