from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from serving.billing.records import Outcome, RequestRecord, TokenCounts
from serving.settings.telemetry import LogSettings
from serving.telemetry.logs import configure_logs, log_request

MS = 1_000_000
RECORD = RequestRecord(
    request_id="r-1",
    tenant_id="acme",
    key_id="k",
    model="nano",
    route="/v1/chat/completions",
    outcome=Outcome.ABORTED,
    status=499,
    tokens=TokenCounts(num_prompt_tokens=7, num_completion_tokens=3),
    arrived_ns=1000 * MS,
    first_byte_ns=1020 * MS,
    ended_ns=1500 * MS,
    queue_wait_ns=5 * MS,
)


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    logger = logging.getLogger("serving")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before
    logging.getLogger("serving.requests").setLevel(logging.NOTSET)


def test_a_request_is_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs(LogSettings())
    log_request(RECORD)
    (line,) = capsys.readouterr().err.splitlines()
    found = json.loads(line)
    assert (found["event"], found["level"], found["logger"]) == ("request", "info", "serving.requests")
    assert (found["request_id"], found["tenant"], found["outcome"], found["status"]) == ("r-1", "acme", "aborted", 499)
    assert (found["queue_ms"], found["first_byte_ms"], found["total_ms"]) == (5, 20, 500)
    assert (found["prompt_tokens"], found["completion_tokens"]) == (7, 3)


def test_a_request_without_an_answer_has_no_first_byte(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs(LogSettings())
    log_request(RequestRecord("r", "t", "", "m", "/v1/completions", Outcome.REFUSED, 400, arrived_ns=9 * MS))
    assert json.loads(capsys.readouterr().err)["first_byte_ms"] == 0


@pytest.mark.parametrize("settings", [LogSettings(requests=False), LogSettings(level="warning")])
def test_requests_need_not_be_logged(settings: LogSettings, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs(settings)
    log_request(RECORD)
    logging.getLogger("serving.router").warning("still told")
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["event"] == "still told"


def test_text_is_for_people_and_setting_it_again_changes_it(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs(LogSettings())
    configure_logs(LogSettings(format="text"))
    log_request(RECORD)
    (line,) = capsys.readouterr().err.splitlines()
    assert "request" in line
    with pytest.raises(json.JSONDecodeError):
        json.loads(line)


def test_a_traceback_stays_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs(LogSettings())
    try:
        raise ZeroDivisionError
    except ZeroDivisionError:
        logging.getLogger("serving.router").exception("failed")
    (line,) = capsys.readouterr().err.splitlines()
    assert "ZeroDivisionError" in json.loads(line)["exception"]
