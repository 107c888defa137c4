"""Keys, what is behind each port, errors, metering and disconnects, seen from outside a stack with keys."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from support.papers import write_pdf

from e2e.endings import ENDED_WITHOUT_SUPERVISOR, check_end, kill_supervisor
from e2e.scripted_stack import SERVING, ScriptedStack, run_scripted_stack, wait_until

SCRIPT = {"tokens_per_s": 200, "output_tokens": 20}
MESSAGES: list[Any] = [{"role": "user", "content": "Hello"}]


@dataclass
class Keyed:
    """A stack that asks for keys, and some that it knows, by tenant."""

    stack: ScriptedStack
    keys: dict[str, str]

    def client(self, tenant: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.stack.url}/v1", api_key=self.keys[tenant], max_retries=0, timeout=30)

    def bearer(self, name: str) -> dict[str, str]:
        """The key that the stack has made for its engines or its metrics, as its user finds it."""
        file = Path(f"/tmp/serving-{os.getuid()}/127.0.0.1-{self.stack.port}.{name}-key")
        assert file.stat().st_mode & 0o777 == 0o600
        return {"authorization": f"Bearer {file.read_text()}"}

    def engine_metric(self, name: str) -> float:
        """The sum of a metric over the replicas."""
        total = 0.0
        for url in self.stack.engines():
            asked = urllib.request.Request(f"{url}/metrics", headers=self.bearer("metrics"))
            with urllib.request.urlopen(asked, timeout=10) as answer:
                lines = answer.read().decode().splitlines()
            total += sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{"))
        return total


def make_key(file: Path, tenant: str, *options: str) -> str:
    command = [str(SERVING), "keys", "create", "--file", str(file), "--tenant", tenant, *options]
    return next(
        word
        for word in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        if word.startswith("sk-")
    )


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    folder = tmp_path_factory.mktemp("keyed")
    file = folder / "keys.yaml"
    keys = {"acme": make_key(file, "acme"), "small": make_key(file, "small", "--rpm", "1")}
    keys["admin"] = make_key(file, "ops", "--admin")
    ocr = {"enabled": True, "cpus_per_replica": 0.1, "directory": str(folder / "ocr")}
    with run_scripted_stack(
        folder, SCRIPT, router={"keys_file": str(file)}, model={"num_replicas": 2}, ocr=ocr
    ) as stack:
        yield Keyed(stack, keys)


def test_a_key_lets_in_and_nothing_else_does(keyed: Keyed) -> None:
    answer = keyed.client("acme").chat.completions.create(model="m", messages=MESSAGES)
    assert answer.choices[0].message.content
    with pytest.raises(openai.AuthenticationError) as caught:
        openai.OpenAI(base_url=f"{keyed.stack.url}/v1", api_key="sk-wrong", max_retries=0).models.list()
    assert caught.value.code == "invalid_api_key"


def test_errors_have_openais_shape(keyed: Keyed) -> None:
    client = keyed.client("acme")
    with pytest.raises(openai.NotFoundError) as not_found:
        client.chat.completions.create(model="gpt-9", messages=MESSAGES)
    assert not_found.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="m", messages=MESSAGES, temperature=-1)
    assert bad.value.param == "temperature"
    answer = httpx.get(f"{keyed.stack.url}/usage")
    assert answer.status_code == 404, "what engines tell the stack is not for clients"


def test_engines_and_metrics_of_a_stack_with_keys_ask_for_theirs(keyed: Keyed) -> None:
    """On a machine of several users the ports of the stack's own are for its user and for Prometheus."""
    engine = keyed.stack.engines()[0]
    wanted, metrics = keyed.bearer("engine"), keyed.bearer("metrics")
    body = {"model": "m", "messages": MESSAGES}
    tenant = {"authorization": f"Bearer {keyed.keys['acme']}"}
    for headers in ({}, tenant, metrics):
        assert httpx.post(f"{engine}/v1/chat/completions", json=body, headers=headers).status_code == 401
        for path in ("/v1/models", "/usage", "/script", "/tokenize"):
            assert httpx.get(engine + path, headers=headers).status_code == 401, path
    assert httpx.post(f"{engine}/v1/chat/completions", json=body, headers=wanted).status_code == 200
    assert httpx.get(f"{engine}/health").status_code == 200
    groups = httpx.get(f"{keyed.stack.url}/metrics/targets", headers=admin(keyed)).json()
    targets = {group["labels"]["job"]: group["targets"][0] for group in groups}
    assert set(targets) == {"router", "engine", "ocr"}
    assert "bearer token" in keyed.stack.log
    for job, target in targets.items():
        for headers in ({}, tenant):
            assert httpx.get(f"http://{target}/metrics", headers=headers).status_code == 401, job
        shown = httpx.get(f"http://{target}/metrics", headers=metrics)
        assert shown.status_code == 200, job
        assert "# TYPE" in shown.text
    reconciled = keyed.stack.command(
        *(
            "billing",
            "reconcile",
            "--config",
            str(keyed.stack.config),
            "--replica",
            f"{replica_of(keyed, engine)}={engine}",
        )
    )
    assert "401" not in reconciled.stdout + reconciled.stderr


def admin(keyed: Keyed) -> dict[str, str]:
    return {"authorization": f"Bearer {keyed.keys['admin']}"}


def replica_of(keyed: Keyed, url: str) -> str:
    state = httpx.get(f"{keyed.stack.url}/admin/state", headers=admin(keyed)).json()
    return next(replica["replica_id"] for replica in state["replicas"] if replica["base_url"] == url)


def test_rays_own_metrics_are_served_nowhere(keyed: Keyed) -> None:
    listening = {
        connection.laddr
        for process in keyed.stack.descendants()
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    }
    assert len(listening) > 5
    for host, port in listening:
        address = "127.0.0.1" if host in ("0.0.0.0", "::") else host
        with contextlib.suppress(httpx.HTTPError):  # most speak gRPC
            answer = httpx.get(f"http://{address}:{port}/metrics", timeout=5)
            assert answer.status_code != 200, (host, port, answer.text[:200])


@pytest.mark.parametrize("is_stream", [False, True])
def test_usage_carries_the_cost_of_what_the_engine_counted(keyed: Keyed, is_stream: bool) -> None:
    client = keyed.client("acme")
    before = keyed.engine_metric("vllm:generation_tokens_total")
    if is_stream:
        options: Any = {"include_usage": True}
        *_, last = client.chat.completions.create(model="m", messages=MESSAGES, stream=True, stream_options=options)
        usage = last.usage
    else:
        usage = client.chat.completions.create(model="m", messages=MESSAGES).usage
    assert usage is not None
    assert usage.completion_tokens == 20
    assert keyed.engine_metric("vllm:generation_tokens_total") - before == 20
    expected = (usage.prompt_tokens * 30 + 20 * 100) / 10**9
    assert usage.model_dump()["estimated_cost"] == pytest.approx(expected, abs=1e-12)


def test_a_limit_is_told_and_kept(keyed: Keyed) -> None:
    client = keyed.client("small")
    answer = client.chat.completions.with_raw_response.create(model="m", messages=MESSAGES)
    assert answer.headers["x-ratelimit-limit-requests"] == "1"
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(model="m", messages=MESSAGES)
    assert caught.value.code == "rate_limit_exceeded"
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60


def test_documents_and_the_page_are_where_the_greeting_says(keyed: Keyed, tmp_path: Path) -> None:
    url = keyed.stack.url
    assert f"POST {url}/v1/ocr," in keyed.stack.log
    assert f"In a browser: {url}/\n" in keyed.stack.log
    assert "default-src 'none'" in httpx.get(f"{url}/").headers["content-security-policy"]
    pdf = write_pdf(tmp_path / "x.pdf", 2, (100, 100)).read_bytes()
    form: dict[str, Any] = {"data": {"model": "m"}, "files": {"file": ("x.pdf", pdf)}, "timeout": 60}
    assert httpx.post(f"{url}/v1/ocr", **form).status_code == 401
    answer = httpx.post(f"{url}/v1/ocr", **form, headers={"authorization": f"Bearer {keyed.keys['acme']}"})
    assert [page["status"] for page in answer.json()["pages"]] == ["completed"] * 2, answer.text


def leave(keyed: Keyed, is_stream: bool) -> float:
    """Seconds from a client's departure until its request no longer runs."""
    # Without min_tokens the scripted answer would be over, at 20 tokens, before anybody can see it run.
    request = {"model": "m", "messages": MESSAGES, "stream": is_stream, "max_tokens": 4000, "min_tokens": 4000}
    body = json.dumps(request).encode()
    with socket.create_connection(("127.0.0.1", keyed.stack.port), timeout=10) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {keyed.keys['acme']}\r\n"
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: keyed.engine_metric("vllm:num_requests_running") == 1, 10, "it runs")
    left_s = time.monotonic()
    wait_until(lambda: keyed.engine_metric("vllm:num_requests_running") == 0, 10, "it was aborted")
    return time.monotonic() - left_s


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_leaves_ends_its_generation_within_a_second(keyed: Keyed, is_stream: bool) -> None:
    # The best of three: asking for the metric alone may take long on a busy machine.
    assert min(leave(keyed, is_stream) for _ in range(3)) < 1.0


def test_nothing_is_left_when_the_supervisor_is_killed(keyed: Keyed) -> None:
    """The last test here: it ends the stack that they share."""
    check_end(keyed.stack, kill_supervisor, -9, ENDED_WITHOUT_SUPERVISOR)
