from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from serving.errors import SettingsError
from serving.front.haproxy import find_binary
from serving.front.haproxy_config import BUFFER_BYTES, count_slots, render_config
from serving.settings import AutoscalingSettings, ModelSettings

from .replicas import build_settings


def render(max_files: int = 20_000, **settings: Any) -> str:
    return render_config(build_settings(**settings), control_fd=5, max_files=max_files)


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines()]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"host": "0.0.0.0", "allow_unauthenticated": True},
        {"host": "::1"},
        {"host": "localhost"},
        {"max_tries": 1, "num_replicas": 3, "cpus_per_replica": 4},
        {"read_timeout_s": 1e9, "connect_timeout_s": 1e-6, "engine": {"drain_s": 0}},
        {"limits": {"max_header_bytes": 2**21, "max_held_bytes": 1024, "max_body_bytes": 2**50}},
        {"port": 1},
    ],
    ids=str,
)
def test_haproxy_accepts_it_without_a_word(settings: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "haproxy.cfg"
    file.write_text(render(**settings).replace("sockpair@5", str(tmp_path / "socket")))
    checked = subprocess.run([find_binary(), "-c", "-f", file], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_settings_become_its_own_words() -> None:
    text = lines(
        render(
            port=8123,
            connect_timeout_s=1.5,
            read_timeout_s=100,
            max_tries=4,
            cpus_per_replica=1.5,
            limits={"header_timeout_s": 3, "body_timeout_s": 20, "write_timeout_s": 30, "max_body_bytes": 4321},
            engine={"drain_s": 7},
        )
    )
    for line in (
        "bind 127.0.0.1:8123",
        "timeout connect 1500ms",
        "timeout server 100000ms",
        "timeout http-request 3000ms",
        "timeout client 30000ms",
        "http-request wait-for-body time 20000ms",
        "hard-stop-after 7000ms",
        "retries 3",
        "nbthread 2",
        f"tune.bufsize {BUFFER_BYTES}",
        "server-template slot 1-32 127.0.0.1:1 check disabled",
    ):
        assert line in text
    too_large = [line.rpartition(" if ")[2] for line in text if line.startswith("http-request return status 413")]
    largest = 100 * 2**20 + 128 * 1024
    assert too_large == ["!is_document { req.body_size gt 4321 }", f"is_document {{ req.body_size gt {largest} }}"]


def test_nothing_but_the_router_is_listened_on() -> None:
    text = lines(render(host="127.0.0.1"))
    assert [line for line in text if line.startswith("bind ")] == ["bind 127.0.0.1:8000"]
    assert [line for line in text if line.startswith("stats socket ")] == ["stats socket sockpair@5 level admin"]


def test_an_ipv6_address_is_put_in_brackets() -> None:
    assert "bind [::1]:8000" in lines(render(host="::1"))


@pytest.mark.parametrize("host", ["", "a b", "127.0.0.1\n  bind *:80", "a'b", "${HOME}", 'a"'])
def test_a_host_that_is_none_is_refused(host: str) -> None:
    settings = build_settings()
    router = settings.router.model_copy(update={"host": host})
    with pytest.raises(SettingsError, match=r"router\.host"):
        render_config(settings.model_copy(update={"router": router}), control_fd=5, max_files=20_000)


def test_every_answer_of_its_own_has_openais_shape() -> None:
    replies = [line for line in lines(render()) if "content-type" in line]
    statuses = set()
    for reply in replies:
        found = re.fullmatch(r".*status (\d+) content-type application/json string ('[^']*')(.*)", reply)
        assert found
        statuses.add(int(found[1]))
        (body,) = shlex.split(found[2])
        assert list(json.loads(body)["error"]) == ["message", "type", "param", "code"]
        assert ("hdr retry-after 1" in found[3]) == (found[1] == "503")
    assert statuses == {400, 403, 408, 413, 431, 500, 502, 503, 504}
    assert any("\\u0027" in reply for reply in replies)


@pytest.mark.parametrize(
    ("max_files", "max_connections"), [(1_000_000, 20_000), (10_000, 4_884), (1024, 396), (236, 2), (235, 1)]
)
def test_connections_fit_the_files_that_may_be_open(max_files: int, max_connections: int) -> None:
    assert lines(render(max_files)).count(f"maxconn {max_connections}") == 2


def test_too_few_files_are_refused() -> None:
    with pytest.raises(SettingsError, match="ulimit"):
        render(max_files=100)


@pytest.mark.parametrize(
    ("model", "num_slots"),
    [
        ({"num_replicas": 1}, 32),
        ({"num_replicas": 8}, 32),
        ({"num_replicas": 9}, 36),
        ({"num_replicas": 9, "autoscaling": AutoscalingSettings(max_replicas=100)}, 400),
    ],
)
def test_there_are_four_slots_for_each_replica_that_there_can_be(model: dict[str, Any], num_slots: int) -> None:
    assert count_slots(ModelSettings(checkpoint="nano", **model)) == num_slots
