"""A router whose ledger has no room left: nothing is begun that could not be recorded, and nothing recorded is lost."""

from __future__ import annotations

from pathlib import Path

from pydantic import SecretStr
from support.ocr_service import reads
from support.router_stack import Engine, build_settings, chat_body, run_router

from serving.billing.spool import read_spools
from serving.settings.billing import BillingSettings, SpoolSettings
from unit.ocr.api.test_metrics import read_metrics


async def test_a_router_refuses_what_it_could_not_record_before_it_costs_anything(tmp_path: Path) -> None:
    billing = BillingSettings(
        directory=tmp_path,
        database_url=SecretStr("postgresql://nobody@127.0.0.1:1/none"),
        spool=SpoolSettings(segment_bytes=4096, alarm_bytes=4096, max_bytes=4096),
    )
    settings = build_settings().model_copy(update={"billing": billing})
    async with (
        Engine(reads()) as engine,
        run_router(engine.record, settings=settings, has_ledger=True) as router,
    ):
        num_served = 0
        while (answer := await router.client.post("/v1/chat/completions", content=chat_body())).status_code == 200:
            num_served += 1
            assert num_served < 100
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "ledger_full")
        assert "retry-after" in answer.headers
        refused = await router.client.post("/v1/completions", content=b'{"model":"nano","prompt":"x"}')
        assert refused.status_code == 503
        assert (await router.client.get("/v1/models")).status_code == 200
        assert len(engine.asked) == num_served > 4
        found = read_metrics(router.app.render_metrics().decode())
        assert found["serving_ledger_spool_used_ratio"][()] >= 1
        assert sum(n for labels, n in found["serving_refusals_total"].items() if "ledger_full" in labels) >= 1
        rows = [record for records in read_spools(tmp_path / "spool", 99) for record in records]
        assert len(rows) == num_served, "a refusal is no row: there is no room for it"
