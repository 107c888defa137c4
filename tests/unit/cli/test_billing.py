from __future__ import annotations

import asyncio
import csv
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from support.billing_samples import NOON_NS, make_record
from typer.testing import CliRunner, Result

from serving.billing.database import Database, ReplicaLife
from serving.billing.engine_counters import CountersError, fetch_readings, load_readings
from serving.billing.periods import NS_PER_HOUR
from serving.billing.spool import open_spool
from serving.cli.billing import app
from serving.settings.stack import Settings, load_settings

COUNTS = {"started_ns": 1, "prompt_tokens": 3000, "completion_tokens": 1500, "requests": 3}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def config(tmp_path: Path, database_url: str | None) -> Path:
    file = tmp_path / "settings.yaml"
    url = f", database_url: '{database_url}'" if database_url else ""
    file.write_text(
        "models: {nano: {checkpoint: nano}}\n"
        f"billing: {{directory: {tmp_path / 'billing'}, replica_hour_dollars: {{nano: 2}}{url}}}\n"
        "engine: {api_key: sesame}\n"
    )
    return file


@pytest.fixture
def settings(config: Path) -> Settings:
    """With three requests: one in the database, and all of them in the spool of a router that is running."""
    settings = load_settings(config, {})
    records = [make_record(number) for number in range(3)]
    spool = open_spool(settings.billing.directory / "spool", "router", settings.billing.spool)
    for record in records:
        spool.append(record)

    async def fill() -> None:
        database = Database(settings.billing)
        await database.migrate()
        await database.insert(records[:1])
        await database.see_replicas([ReplicaLife("nano#1", "nano", NOON_NS, NOON_NS + NS_PER_HOUR, 2 * 10**9)])
        await database.close()

    asyncio.run(fill())
    return settings


class Replica(BaseHTTPRequestHandler):
    answer: bytes = json.dumps(COUNTS).encode()
    status = 200

    def do_GET(self) -> None:
        is_known = self.path == "/usage" and self.headers["authorization"] == "Bearer sesame"
        self.send_response(self.status if is_known else 401)
        self.end_headers()
        self.wfile.write(self.answer)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name in the base
        pass


@pytest.fixture
def replica_url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Replica) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_fresh_database_is_made_and_told(config: Path) -> None:
    for _ in range(2):
        assert run("migrate", "-c", config).output == "the ledger is up to date\n"
    result = run("report", "-c", config, "--month", "2026-11", "--format", "json")
    assert json.loads(result.output)["total"]["num_requests"] == 0


@pytest.mark.usefixtures("settings")
def test_a_months_report_holds_what_is_still_in_spools(config: Path) -> None:
    result = run("report", "-c", config, "--month", "2026-11", "--by", "day,model", "--format", "csv")
    assert result.exit_code == 0
    [row] = csv.DictReader(io.StringIO(result.output))
    assert (row["day"], row["model"], row["num_requests"], row["cost_dollars"]) == (
        "2026-11-23",
        "nano",
        "3",
        "0.000240000",
    )
    table = run("report", "-c", config, "--since", "2026-11-23", "--until", "2026-11-24").output
    assert "total" in table
    assert "0.000240000" in table
    assert json.loads(run("report", "-c", config, "--month", "2026-12", "-f", "json", "--by", "").output)["total"] == {
        **json.loads(run("report", "-c", config, "--month", "2026-11", "-f", "json", "--tenant", "x").output)["total"],
    }


@pytest.mark.usefixtures("settings")
def test_costs_are_printed_in_every_format(config: Path) -> None:
    shown = json.loads(run("costs", "-c", config, "--month", "2026-11", "-f", "json").output)["data"]
    assert [(line["model"], line["tenant_id"]) for line in shown] == [("nano", ""), ("nano", "acme")]
    assert shown[0]["spend_nanodollars"] == 2 * 10**9
    assert run("costs", "-c", config, "--month", "2026-11", "-f", "csv").output.startswith("model,tenant_id,")
    assert "333.333333333" in run("costs", "-c", config, "--month", "2026-11").output


@pytest.mark.usefixtures("settings")
def test_equal_counts_end_well(config: Path, replica_url: str, tmp_path: Path) -> None:
    reading = tmp_path / "reading.json"
    result = run("reconcile", "-c", config, "--replica", f"nano#1={replica_url}", "--save", reading)
    assert result.exit_code == 0, result.output
    assert "equal" in result.output
    assert load_readings(reading).replicas["nano#1"].totals.requests == 3
    again = run("reconcile", "-c", config, "--counters", reading, "--since-reading", reading)
    assert again.exit_code == 0, again.output


@pytest.mark.usefixtures("settings")
def test_a_difference_ends_badly(config: Path, replica_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Replica, "answer", json.dumps({**COUNTS, "completion_tokens": 1501}).encode())
    result = run("reconcile", "-c", config, "--replica", f"nano#1={replica_url}")
    assert result.exit_code == 1
    assert "different" in result.output
    assert "-1" in result.output


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["report", "--month", "November"], "is not a month such as 2026-11"),
        (["report", "--by", "colour"], "cannot group by"),
        (["report", "--until", "2026-11-01"], "--until needs --since"),
        (["report", "--since", "2026-11-02", "--until", "2026-11-01"], "must be later"),
        (["costs", "--since", "2026-11-02", "--month", "2026-11"], "exclude each other"),
        (["reconcile"], "no replicas are given"),
        (["reconcile", "--replica", "nano#1"], "is not ID=URL"),
        (["reconcile", "--replica", "nano#1=http://127.0.0.1:1"], "cannot be reached"),
        (["reconcile", "--counters", "/nowhere"], "cannot be read"),
        (["reconcile", "--since-reading", "/dev/null"], "holds no readings"),
    ],
)
def test_what_cannot_be_done_is_said(config: Path, arguments: list[str], reason: str) -> None:
    result = run(*arguments, "-c", config)
    assert result.exit_code == 2
    assert reason in result.output


def test_settings_and_databases_that_cannot_be_used_are_told(tmp_path: Path) -> None:
    result = run("migrate", "-c", tmp_path / "none.yaml")
    assert (result.exit_code, "cannot be read" in result.output) == (2, True)
    file = tmp_path / "settings.yaml"
    file.write_text("models: {m: {checkpoint: x}}\nbilling: {database_url: 'postgresql://a:secret@127.0.0.1:1/x'}")
    result = run("migrate", "-c", file)
    assert (result.exit_code, "cannot be used" in result.output) == (2, True)
    assert "secret" not in result.output


@pytest.mark.parametrize("answer", [b"{}", b"[]", b"x", json.dumps({**COUNTS, "requests": -1}).encode()])
def test_answers_that_are_no_counts_are_refused(
    replica_url: str, monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    monkeypatch.setattr(Replica, "answer", answer)
    with pytest.raises(CountersError, match=r"does not (return|answer)"):
        asyncio.run(fetch_readings({"r": replica_url}, time_ns=0, api_key="sesame"))


def test_a_replica_that_lets_nobody_in_is_told(replica_url: str) -> None:
    with pytest.raises(CountersError, match="answers 401"):
        asyncio.run(fetch_readings({"r": replica_url}, time_ns=0))
