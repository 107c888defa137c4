from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import httpx
import orjson
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from prometheus_client.parser import text_string_to_metric_families

from serving.engine.scripted.answering import UsageFrames
from serving.engine.scripted.app import ScriptedEngine, run_scripted
from serving.errors import SettingsError
from serving.http.server import HttpServer
from serving.settings.stack import ScriptSettings

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@dataclass
class Served:
    engine: ScriptedEngine
    client: httpx.AsyncClient
    exits: list[int]

    async def ask(self, path: str = CHAT, request_id: str | None = None, **fields: Any) -> httpx.Response:
        return await self.client.post(path, json=body(path, **fields), headers=id_header(request_id))

    def stream(self, request_id: str | None = None, **fields: Any) -> contextlib.AbstractAsyncContextManager[Any]:
        fields = body(CHAT, stream=True, **fields)
        return self.client.stream("POST", CHAT, json=fields, headers=id_header(request_id))

    async def usage(self, request_id: str) -> dict[str, Any]:
        usage: dict[str, Any] = (await self.client.get(f"/usage/{request_id}")).json()
        return usage

    def num_generated(self, request_id: str) -> int:
        """Tokens of a request so far; 0 if the engine does not know it yet."""
        usage = self.engine.find_usage(request_id)
        return 0 if usage is None else usage.completion_tokens

    async def metrics(self) -> dict[str, float]:
        text = (await self.client.get("/metrics")).text
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        assert all(sample.labels["model_name"] == "nano" for sample in samples)
        return {sample.name + sample.labels.get("finished_reason", ""): sample.value for sample in samples}


def body(path: str, **fields: Any) -> dict[str, Any]:
    prompt = {"prompt": "Hello"} if path == TEXT else {"messages": [{"role": "user", "content": "Hello"}]}
    return {"model": "nano", **prompt, **fields}


def id_header(request_id: str | None) -> dict[str, str]:
    return {} if request_id is None else {"X-Request-Id": request_id}


@contextlib.asynccontextmanager
async def serve(usage_frames: UsageFrames = "last", api_key: str | None = None, **script: Any) -> AsyncIterator[Served]:
    exits: list[int] = []
    engine = ScriptedEngine(
        ScriptSettings(**{"output_tokens": 4, **script}),
        ("nano", "alias"),
        api_key=api_key,
        usage_frames=usage_frames,
        exit_process=exits.append,
    )
    server = HttpServer(engine, host="127.0.0.1", port=0, drain_s=1, has_lifespan=True)
    await server.start()
    try:
        base_url = f"http://127.0.0.1:{server.port}"
        async with httpx.AsyncClient(base_url=base_url, timeout=30, trust_env=False) as client:
            yield Served(engine, client, exits)
    finally:
        await server.stop()


def read_frames(text: str) -> list[dict[str, Any]]:
    """The events of a stream that ends as it should."""
    *frames, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [orjson.loads(frame.removeprefix("data: ")) for frame in frames]


async def test_a_whole_chat_answer_is_openais() -> None:
    async with serve() as served:
        response = await served.ask(request_id="r1")
    answer = ChatCompletion.model_validate(response.json())
    assert answer.id == "chatcmpl-r1"
    assert answer.choices[0].message.content == " the page reads as"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 4, 7)


async def test_a_whole_completion_is_openais() -> None:
    async with serve() as served:
        response = await served.ask(TEXT, n=2, max_tokens=2)
    answer = Completion.model_validate(response.json())
    assert [(choice.text, choice.finish_reason) for choice in answer.choices] == [(" the page", "length")] * 2
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4


async def test_a_stream_is_role_tokens_usage_and_done() -> None:
    async with serve() as served:
        response = await served.ask(stream=True)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    chunks = [ChatCompletionChunk.model_validate(frame) for frame in read_frames(response.text)]
    role, *tokens, last = chunks
    assert role.choices[0].delta.role == "assistant"
    assert [token.choices[0].delta.content for token in tokens] == [" the", " page", " reads", " as"]
    assert [token.choices[0].finish_reason for token in tokens] == [None, None, None, "stop"]
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 4


async def test_a_stream_of_several_choices_interleaves_them() -> None:
    async with serve() as served:
        frames = read_frames((await served.ask(TEXT, stream=True, n=2, max_tokens=2)).text)
    told = [(choice["index"], choice["text"]) for frame in frames for choice in frame["choices"]]
    assert told == [(0, " the"), (1, " the"), (0, " page"), (1, " page")]
    assert frames[-1]["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize(
    ("usage_frames", "options", "num_with_usage"),
    [
        ("last", None, 1),
        ("last", {"include_usage": False}, 0),
        ("last", {"include_usage": True, "continuous_usage_stats": True}, 6),
        ("asked", None, 0),
        ("asked", {"include_usage": True}, 1),
        ("forced", {"include_usage": False}, 6),
    ],
)
async def test_usage_is_told_as_was_asked(
    usage_frames: UsageFrames, options: dict[str, bool] | None, num_with_usage: int
) -> None:
    async with serve(usage_frames) as served:
        frames = read_frames((await served.ask(stream=True, stream_options=options)).text)
    assert sum("usage" in frame for frame in frames) == num_with_usage


async def test_frames_come_one_at_a_time_and_at_the_given_rate() -> None:
    started_s = time.monotonic()
    async with serve(tokens_per_s=50) as served, served.stream() as response:
        times = [time.monotonic() - started_s async for _ in response.aiter_raw()]
    assert len(times) >= 5
    assert times[-1] > 3 / 50 - 0.005


async def test_prompts_are_read_one_after_another() -> None:
    async with serve(prefill_tokens_per_s=60) as served:
        started_s = time.monotonic()
        await asyncio.gather(served.ask(), served.ask())
        assert time.monotonic() - started_s > 2 * 3 / 60 - 0.005


async def test_so_many_run_and_others_wait_in_order() -> None:
    order: list[int] = []

    async def ask(served: Served, number: int) -> None:
        await served.ask()
        order.append(number)

    async with serve(max_num_seqs=1, tokens_per_s=0.01) as served:  # no answer ends before all three are there
        tasks = []
        for number in range(3):
            tasks.append(asyncio.create_task(ask(served, number)))
            await until(lambda: served.engine.batch.num_running + served.engine.batch.num_waiting == len(tasks))
        metrics = await served.metrics()
        await served.client.post("/script", json={"tokens_per_s": 100})
        await asyncio.gather(*tasks)
    assert (metrics["vllm:num_requests_running"], metrics["vllm:num_requests_waiting"]) == (1, 2)
    assert order == [0, 1, 2]


async def test_more_choices_than_places_take_all_of_them() -> None:
    async with serve(max_num_seqs=2) as served:
        assert len((await served.ask(n=5)).json()["choices"]) == 5


@pytest.mark.parametrize("is_stream", [True, False])
async def test_a_client_that_leaves_aborts_and_what_it_used_is_known(is_stream: bool) -> None:
    async with serve(tokens_per_s=200, output_tokens=100_000, max_model_len=200_000) as served:
        asking = asyncio.create_task(served.ask(request_id="gone", stream=is_stream))
        await until(lambda: served.num_generated("gone") > 0)
        asking.cancel()
        await until(lambda: served.engine.batch.num_running == 0)
        usage, metrics = await served.usage("gone"), await served.metrics()
    assert usage["finish_reason"] == "abort"
    assert usage["is_finished"]
    assert 1 <= usage["completion_tokens"] < 100_000
    assert metrics["vllm:generation_tokens_total"] == usage["completion_tokens"]
    assert metrics["vllm:request_success_totalabort"] == 1


async def test_a_client_that_leaves_while_it_waits_frees_its_place_at_once() -> None:
    async with serve(max_num_seqs=1, tokens_per_s=0.01) as served:
        running = asyncio.create_task(served.ask())
        await until(lambda: served.engine.batch.num_running == 1)
        waiting = asyncio.create_task(served.ask(request_id="gone"))
        await until(lambda: served.engine.batch.num_waiting == 1)
        waiting.cancel()
        await until(lambda: served.engine.batch.num_waiting == 0)
        usage = await served.usage("gone")
        await served.client.post("/script", json={"tokens_per_s": None})
        await running
    assert (usage["completion_tokens"], usage["finish_reason"]) == (0, "abort")


async def test_usage_is_remembered_by_request_id() -> None:
    async with serve() as served:
        await served.ask(request_id="r1")
        assert await served.usage("r1") == {
            "request_id": "r1",
            "prompt_tokens": 3,
            "image_tokens": 0,
            "cached_tokens": 0,
            "completion_tokens": 4,
            "finish_reason": "stop",
            "is_finished": True,
        }
        assert (await served.client.get("/usage/r2")).status_code == 404


async def test_usage_grows_while_a_request_runs() -> None:
    async with serve(tokens_per_s=100, output_tokens=1000) as served, served.stream("r1") as response:
        parts = response.aiter_raw()
        for _ in range(3):
            await anext(parts)
        usage = await served.usage("r1")
    assert usage["completion_tokens"] >= 1
    assert (usage["finish_reason"], usage["is_finished"]) == (None, False)


async def test_the_last_requests_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.engine.scripted.batching._KEPT", 1)
    async with serve() as served:
        await served.ask(request_id="r1")
        await served.ask(request_id="r2")
        assert (await served.client.get("/usage/r1")).status_code == 404
        assert (await served.usage("r2"))["is_finished"]


async def test_lists_health_and_what_is_not_there() -> None:
    async with serve() as served:
        models = (await served.client.get("/v1/models")).json()["data"]
        assert [(card["id"], card["max_model_len"]) for card in models] == [("nano", 8192), ("alias", 8192)]
        assert (await served.client.get("/health")).status_code == 200
        assert (await served.client.get("/nothing")).json()["error"]["code"] == 404
        assert (await served.ask(model="other")).json()["error"]["type"] == "NotFoundError"


async def test_a_key_is_asked_for_where_vllm_asks() -> None:
    async with serve(api_key="sesame") as served:
        assert (await served.ask()).status_code == 401
        assert (await served.client.get("/health")).status_code == 200
        served.client.headers["authorization"] = "Bearer sesame"
        assert (await served.ask()).status_code == 200


async def test_a_status_is_answered_in_vllms_shape() -> None:
    async with serve(failures=("status:503:every=2:retry_after_s=3",)) as served:
        assert (await served.ask()).status_code == 200
        refused = await served.ask(stream=True)
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "3"
    assert refused.json()["error"]["code"] == 503


@pytest.mark.parametrize("is_stream", [True, False])
async def test_a_refused_connection_gets_no_byte(is_stream: bool) -> None:
    async with serve(failures=("refuse",)) as served:
        with pytest.raises(httpx.RemoteProtocolError, match="without sending a response"):
            await served.ask(stream=is_stream)


async def test_a_stream_is_cut_after_its_tokens() -> None:
    async with serve(failures=("die:after_tokens=2",)) as served:
        text = ""
        async with served.stream("r1") as response:
            with contextlib.suppress(httpx.RemoteProtocolError):
                async for part in response.aiter_text():
                    text += part
        usage = await served.usage("r1")
    assert len(re.findall('"content":" ', text)) == 2
    assert "[DONE]" not in text
    assert (usage["completion_tokens"], usage["finish_reason"]) == (2, "abort")


async def test_a_whole_answer_is_cut_without_a_byte() -> None:
    async with serve(failures=("die:after_tokens=2",)) as served:
        with pytest.raises(httpx.RemoteProtocolError):
            await served.ask(request_id="r1")
        assert (await served.usage("r1"))["completion_tokens"] == 2


async def test_a_shorter_answer_is_not_struck() -> None:
    async with serve(failures=("die:after_tokens=5",)) as served:
        assert (await served.ask()).status_code == 200
        assert read_frames((await served.ask(stream=True)).text)


async def test_a_stalled_stream_stays_silent_until_the_client_leaves() -> None:
    async with serve(failures=("stall:after_tokens=1:times=1",)) as served:
        async with served.stream() as response:
            parts, text = response.aiter_text(), ""
            while 'content":" the' not in text:
                text += await anext(parts)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(parts), 0.1)
        await until(lambda: served.engine.batch.num_running == 0)
        assert (await served.ask(stream=True)).status_code == 200


async def test_a_stall_and_a_slow_start_may_pass() -> None:
    async with serve(failures=("stall:after_tokens=1:for_s=0.05:every=2", "slow_start:0.05")) as served:
        for _ in range(2):
            started_s = time.monotonic()
            assert read_frames((await served.ask(stream=True)).text)
            assert time.monotonic() - started_s > 0.045


async def test_an_error_ends_a_stream_as_vllm_does() -> None:
    async with serve(failures=("error:after_tokens=2",)) as served:
        frames = read_frames((await served.ask(stream=True)).text)
        assert (await served.ask()).status_code == 500
    assert len(frames) == 4
    assert frames[-1]["error"]["code"] == 500


async def test_the_process_ends_when_the_script_says_so() -> None:
    async with serve(failures=("exit:after_requests=1",)) as served:
        await served.ask()
        assert served.exits == []
        await served.ask()
        assert served.exits == [1]


async def test_a_dead_engine_says_so_everywhere() -> None:
    async with serve(failures=("dead:after_requests=1",), tokens_per_s=100, output_tokens=8000) as served:
        running = asyncio.create_task(served.ask(stream=True))
        await until(lambda: served.engine.batch.num_running == 1)
        assert (await served.ask()).status_code == 500
        assert read_frames((await running).text)[-1]["error"]["code"] == 500
        assert (await served.ask()).status_code == 500
        assert (await served.client.get("/health")).status_code == 503
        assert served.engine.errored
        assert not served.engine.is_running
        assert isinstance(served.engine.dead_error, RuntimeError)


async def test_the_script_is_changed_while_it_runs() -> None:
    async with serve() as served:
        told = (await served.client.post("/script", json={"output_tokens": 2, "failures": ["status:500"]})).json()
        assert (told["output_tokens"], told["failures"], told["num_requests"]) == (2, ["status:500"], 0)
        assert (await served.ask()).status_code == 500
        assert (await served.client.get("/script")).json()["num_requests"] == 1
        await served.client.post("/script", json={"failures": []})
        assert (await served.ask()).json()["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("changes", [b"{", b"[]", b'{"failures":["explode"]}', b'{"output_tokens":0}', b'{"speed":1}'])
async def test_a_script_that_is_not_understood_changes_nothing(changes: bytes) -> None:
    async with serve() as served:
        before = (await served.client.get("/script")).json()
        assert (await served.client.post("/script", content=changes)).status_code == 400
        assert (await served.client.get("/script")).json() == before


async def test_it_starts_as_slowly_as_it_is_told_and_shows_what_a_replica_reads() -> None:
    started_s = time.monotonic()
    async with run_scripted(ScriptSettings(start_s=0.05, max_num_seqs=3), ["nano"]) as (engine, app):
        assert time.monotonic() - started_s > 0.045
        assert app is engine
        assert (engine.max_num_seqs, engine.kv_tokens, engine.max_model_len) == (3, 65_536, 8192)
        assert engine.is_running
        assert not engine.errored


def test_failures_that_are_not_understood_are_refused_at_the_start() -> None:
    with pytest.raises(SettingsError):
        ScriptedEngine(ScriptSettings(failures=("explode",)), ["nano"])


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while True:
            if is_so():
                return
            await asyncio.sleep(0.005)
