from __future__ import annotations

from pathlib import Path

import httpx
from pydantic import SecretStr

from serving.cluster.directory import ReplicaRecord, ReplicaState, RouterReport, Snapshot
from serving.telemetry.exporter import MetricsServer
from serving.telemetry.targets import TargetsFile, list_targets


async def test_metrics_and_targets_have_a_port_of_their_own() -> None:
    numbers = iter((b"a 1\n", b"a 2\n"))
    server = MetricsServer(lambda: next(numbers), lambda: [{"targets": ["h:1"], "labels": {}}], "127.0.0.1")
    await server.start()
    try:
        assert server.is_serving
        async with httpx.AsyncClient(trust_env=False) as client:
            first = await client.get(server.url)
            assert (first.content, first.headers["content-type"].split(";")[0]) == (b"a 1\n", "text/plain")
            assert (await client.get(server.url)).content == b"a 2\n"
            targets = await client.get(f"{server.url}/targets")
            assert targets.json() == [{"targets": ["h:1"], "labels": {}}]
            assert targets.headers["content-type"] == "application/json"
            assert (await client.get(server.url.removesuffix("/metrics"))).status_code == 404
            refused = await client.post(server.url)
            assert (refused.status_code, refused.headers["allow"]) == (405, "GET")
    finally:
        await server.stop()
    assert not server.is_serving


async def test_metrics_with_a_key_are_for_who_brings_it() -> None:
    server = MetricsServer(lambda: b"a 1\n", list, "127.0.0.1", SecretStr("sesame"))
    await server.start()
    try:
        async with httpx.AsyncClient(trust_env=False) as client:
            for path in ("", "/targets"):
                refused = await client.get(server.url + path)
                assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
                answer = await client.get(server.url + path, headers={"authorization": "Bearer sesame"})
                assert answer.status_code == 200
    finally:
        await server.stop()


def test_every_process_is_a_target_of_its_own() -> None:
    def replica(name: str, url: str) -> ReplicaRecord:
        return ReplicaRecord(name, "nano", url, ReplicaState.READY)

    snapshot = Snapshot(
        (1, 1), (replica("b", "http://10.0.0.2:81"), replica("a", "http://10.0.0.1:80"), replica("c", ""))
    )
    reports = (RouterReport("r2", metrics_url="http://10.0.0.3:90/metrics"), RouterReport("r1"))
    assert list_targets(snapshot, reports) == [
        {"targets": ["10.0.0.3:90"], "labels": {"job": "router", "router": "r2"}},
        {"targets": ["10.0.0.1:80"], "labels": {"job": "engine", "model": "nano", "replica": "a"}},
        {"targets": ["10.0.0.2:81"], "labels": {"job": "engine", "model": "nano", "replica": "b"}},
    ]


def test_the_file_is_written_when_the_list_changes(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "targets.json"
    written = TargetsFile(file)
    groups = list_targets(Snapshot((1, 1)), (RouterReport("r", metrics_url="http://h:1/metrics"),))
    assert written.write(groups)
    assert not written.write(groups)
    assert b'"h:1"' in file.read_bytes()
    assert file.stat().st_mode & 0o777 == 0o644
    assert written.write([])
    assert [entry.name for entry in file.parent.iterdir()] == ["targets.json"]
