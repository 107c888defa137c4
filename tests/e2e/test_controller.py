"""Ray Serve's controller dies, as it does with a head node: what serves goes on serving."""

from __future__ import annotations

import json
import time
import urllib.request

import openai
import psutil

from e2e.conftest import Stack

_WITHIN_S = 90.0


def find_controller(stack: Stack) -> psutil.Process:
    (found,) = (each for each in stack.descendants() if "ServeController" in " ".join(each.cmdline()[:1]))
    return found


def test_engines_outlive_the_controller(stack: Stack, client: openai.OpenAI) -> None:
    before = replicas(stack)
    controller = find_controller(stack)
    controller.kill()
    deadline_s = time.monotonic() + _WITHIN_S
    while not is_successor_there(stack, controller.pid):
        assert time.monotonic() < deadline_s, "no new controller"
        time.sleep(0.5)
    # A new controller asks every replica within its first seconds, and stops those that do not answer well.
    for _ in range(20):
        answer = client.chat.completions.create(
            model="nano", messages=[{"role": "user", "content": "Hello"}], max_tokens=4
        )
        assert answer.usage is not None
        time.sleep(0.5)
    assert replicas(stack) == before


def is_successor_there(stack: Stack, old_pid: int) -> bool:
    try:
        return find_controller(stack).pid != old_pid
    except (ValueError, psutil.NoSuchProcess):
        return False


def replicas(stack: Stack) -> dict[str, str]:
    with urllib.request.urlopen(f"{stack.url}/admin/state", timeout=10) as answer:
        return {entry["replica_id"]: entry["base_url"] for entry in json.load(answer)["replicas"]}
