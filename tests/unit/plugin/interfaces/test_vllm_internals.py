"""Fails loudly when vLLM moves something that it never promised. See `serving/plugin/interfaces/vllm_internals.py`."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import vllm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.model_executor.models.interfaces import SupportsMultiModal

from serving.plugin.interfaces import vllm_internals


def test_this_is_the_version_that_the_private_interfaces_were_read_in() -> None:
    assert vllm.__version__ == vllm_internals.VLLM_VERSION


def test_encoder_layers_take_the_sizes_that_are_given_to_them() -> None:
    sam, clip, projector = vllm_internals.encoder_layers()
    wanted = {"img_size", "embed_dim", "depth", "num_heads", "out_chans", "window_size", "global_attn_indexes"}
    assert wanted <= set(inspect.signature(sam).parameters)
    assert {"config", "quant_config", "prefix"} <= set(inspect.signature(clip).parameters)
    assert list(inspect.signature(projector).parameters) == ["cfg"]


def test_a_chat_template_replaces_vllms_own_for_the_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.transformers_utils.chat_templates import get_chat_template_fallback_path, registry
    from vllm.transformers_utils.configs.deepseek_vl2 import DeepseekVLV2Config

    monkeypatch.setattr(registry, "_MODEL_TYPE_TO_CHAT_TEMPLATE_FALLBACK", {"deepseek_ocr": tmp_path / "stock"})
    vllm_internals.set_chat_template("deepseek_ocr", tmp_path / "own")
    model_type = DeepseekVLV2Config(architectures=["DeepseekOCRForCausalLM"]).model_type
    assert get_chat_template_fallback_path(model_type, "nano") == tmp_path / "own"


@pytest.mark.parametrize("name", ["_mark_tower_model", "_mark_language_model"])
def test_the_markers_of_a_models_parts_exist(name: str) -> None:
    assert callable(getattr(SupportsMultiModal, name))


def test_the_processors_hook_is_still_called_with_the_images() -> None:
    from vllm.multimodal.processing import BaseMultiModalProcessor

    assert list(inspect.signature(BaseMultiModalProcessor._call_hf_processor).parameters) == [
        "self",
        "hf_data",
        "hf_kwargs",
    ]


def test_the_servers_arguments_are_known_and_parsed() -> None:
    assert {
        "model",
        "max_model_len",
        "enable_prefix_caching",
        "served_model_name",
    } <= vllm_internals.known_server_args()
    parsed = vllm_internals.parse_server_args(["--model", "x", "--max-model-len", "64", "--no-enable-prefix-caching"])
    assert (parsed.model, parsed.max_model_len, parsed.enable_prefix_caching) == ("x", 64, False)


def test_the_parts_of_vllms_own_server_can_be_put_together_as_we_do() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client_from_engine_args
    from vllm.entrypoints.launchers.app import build_app

    assert list(inspect.signature(build_app).parameters) == ["args", "supported_tasks", "model_config"]
    assert list(inspect.signature(init_app_state).parameters) == ["engine_client", "state", "args", "supported_tasks"]
    assert next(iter(inspect.signature(build_async_engine_client_from_engine_args).parameters)) == "engine_args"
    assert callable(AsyncEngineArgs.from_cli_args)


def test_the_plugin_takes_the_published_architectures_place() -> None:
    from vllm import ModelRegistry

    from serving.plugin import register
    from serving.plugin.modes.families import DEEPSEEK_OCR

    register()
    register()
    assert ModelRegistry.models[DEEPSEEK_OCR.architecture].module_name == "serving.plugin.model.deepseek_ocr"


def test_the_hooks_of_an_architectures_engine_config_and_of_the_scheduler_exist() -> None:
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    seen: list[object] = []
    vllm_internals.adapt_engine_config("NoSuchArchitecture", seen.append)
    try:
        MODELS_CONFIG_MAP["NoSuchArchitecture"].verify_and_update_config("config")
    finally:
        del MODELS_CONFIG_MAP["NoSuchArchitecture"]
    assert seen == ["config"]
    assert callable(VerifyAndUpdateConfig.verify_and_update_config)
    for scheduler in (Scheduler, AsyncScheduler):
        parameters = inspect.signature(scheduler._update_request_with_output).parameters
        assert list(parameters) == ["self", "request", "new_token_ids", "is_stale"]


@pytest.mark.parametrize(
    ("finish_reason", "num_tokens", "max_tokens", "is_noted"),
    [("LENGTH", 5, 9, True), ("LENGTH", 9, 9, False), ("STOP", 5, 9, False), ("LENGTH", 13, 99, False)],
    ids=["cut", "at max_tokens", "ended by itself", "at the model's length"],
)
def test_ends_before_a_requests_limits_are_noted_with_its_output(
    monkeypatch: pytest.MonkeyPatch, finish_reason: str, num_tokens: int, max_tokens: int, is_noted: bool
) -> None:
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
    from vllm.v1.engine.output_processor import OutputProcessor

    monkeypatch.setattr(OutputProcessor, "_update_stats_from_finished", OutputProcessor._update_stats_from_finished)
    noted: list[list[int]] = []
    vllm_internals.watch_early_length_ends(16, lambda output: pytest.fail("the last call counts"))
    vllm_internals.watch_early_length_ends(16, lambda output: noted.append(list(output)))
    processor = OutputProcessor(None, log_stats=False)
    params = SamplingParams(max_tokens=max_tokens, detokenize=False)
    request = EngineCoreRequest("r", [1, 2, 3], None, params, None, 0.0, None, None, None, external_req_id="e")
    processor.add_request(request, None)
    for token in range(num_tokens - 1):
        processor.process_outputs([EngineCoreOutput("r", [token])])
        assert not noted
    last = EngineCoreOutput("r", [num_tokens - 1], finish_reason=FinishReason[finish_reason], stop_reason="why")
    processor.process_outputs([last])
    assert noted == ([list(range(num_tokens))] if is_noted else [])


def test_only_two_limits_end_a_request_as_too_long() -> None:
    """What lets an earlier end be told for the loop stop's."""
    import vllm.v1.core.sched.scheduler
    from vllm.v1.core.sched import utils

    assert "LENGTH_CAPPED" not in inspect.getsource(vllm.v1.core.sched.scheduler)
    assert inspect.getsource(utils).count("LENGTH_CAPPED") == 1
    assert "num_tokens >= max_model_len" in inspect.getsource(utils)
    assert "request.num_output_tokens >= request.max_tokens" in inspect.getsource(utils)


@pytest.fixture(scope="module")
def text_chunks() -> Iterator[tuple[Any, Any, Any, Any]]:
    """vLLM's chat module with our chunks in it, and its own three classes."""
    from vllm.entrypoints.openai.chat_completion import serving as chat

    names = ("DeltaMessage", "ChatCompletionResponseStreamChoice", "ChatCompletionStreamResponse")
    classes = {name: getattr(chat, name) for name in names}
    vllm_internals.write_text_chunks()
    vllm_internals.write_text_chunks()
    yield chat, *classes.values()
    vars(chat).update(classes)


HEAD = {"object": "chat.completion.chunk", "created": 1_763_000_000}
NOTHING = {"logprobs": None, "finish_reason": None, "token_ids": None}


@given(
    text=st.text(st.characters(exclude_categories=["Cs"])),
    name=st.text(st.characters(exclude_categories=["Cs"])),
    index=st.integers(0, 9),
    changes=st.sampled_from([{}, {"finish_reason": "stop"}, {"finish_reason": "length", "stop_reason": "repetition"}]),
    has_usage=st.booleans(),
    has_all=st.booleans(),
)
def test_chunks_of_text_are_the_bytes_of_vllms_own_models(
    text_chunks: tuple[Any, Any, Any, Any],
    text: str,
    name: str,
    index: int,
    changes: dict[str, str],
    has_usage: bool,
    has_all: bool,
) -> None:
    from vllm.entrypoints.serve.engine.protocol import UsageInfo

    chat, *own = text_chunks
    dumped = []
    for delta, choice, chunk in (own, [vars(chat)[each.__name__] for each in own]):
        more = {**(NOTHING if has_all else {}), **changes}
        made = chunk(id=name, model=name, choices=[choice(index=index, delta=delta(content=text), **more)], **HEAD)
        if has_usage:
            made.usage = UsageInfo(prompt_tokens=1, completion_tokens=2, total_tokens=3)
        dumped.append(made.model_dump_json(exclude_unset=True))
    assert dumped[0] == dumped[1]


def test_chunks_of_anything_else_are_vllms_own(text_chunks: tuple[Any, Any, Any, Any]) -> None:
    chat, delta, choice, chunk = text_chunks
    first = chat.ChatCompletionResponseStreamChoice(index=0, delta=chat.DeltaMessage(role="assistant", content=""))
    assert type(chat.DeltaMessage()) is type(chat.DeltaMessage(content=None)) is delta
    assert type(first) is choice
    assert type(chat.ChatCompletionStreamResponse(id="i", model="m", choices=[first])) is chunk
    assert type(chat.ChatCompletionStreamResponse(id="i", model="m", choices=[])) is chunk


def test_calls_of_tools_are_looked_for_in_chunks_of_text_too(text_chunks: tuple[Any, Any, Any, Any]) -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.serve.utils.tool_calls_utils import maybe_filter_parallel_tool_calls

    chat = text_chunks[0]
    text = chat.ChatCompletionResponseStreamChoice(index=0, delta=chat.DeltaMessage(content="x"), **NOTHING)
    request = ChatCompletionRequest(messages=[], parallel_tool_calls=False)
    assert maybe_filter_parallel_tool_calls(text, request) is text


@pytest.fixture
def _bodies_with_orjson() -> Iterator[None]:
    from starlette.requests import Request

    own = Request.json
    vllm_internals.read_bodies_with_orjson()
    vllm_internals.read_bodies_with_orjson()
    assert Request.json.__wrapped__ is own  # type: ignore[attr-defined]
    yield
    Request.json = own  # type: ignore[method-assign]


def parse_body(body: bytes) -> Any:
    from starlette.requests import Request

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def ask() -> Any:
        request = Request({"type": "http", "method": "POST", "headers": []}, receive)
        parsed = await request.json()
        assert await request.json() is parsed
        return parsed

    return asyncio.run(ask())


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(), values, max_size=4),
    max_leaves=12,
)


@pytest.mark.usefixtures("_bodies_with_orjson")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(value=st.dictionaries(st.text(), VALUES, max_size=4), encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))
def test_bodies_are_what_the_standard_library_reads(value: dict[str, Any], encoding: str) -> None:
    for is_ascii in (True, False):
        body = json.dumps(value, ensure_ascii=is_ascii).encode(encoding)
        assert repr(parse_body(body)) == repr(json.loads(body))  # NaN is not equal to itself


@pytest.mark.usefixtures("_bodies_with_orjson")
def test_half_a_surrogate_in_a_body_is_read_as_before() -> None:
    assert parse_body(b'{"a": "\\ud800"}') == {"a": "\ud800"}


@pytest.mark.usefixtures("_bodies_with_orjson")
@pytest.mark.parametrize("body", [b"", b"{", b'{"a": 1}}', b"\xff\xfe\xfd", b'"\x01"'])
def test_bodies_that_are_no_json_fail_as_in_the_standard_library(body: bytes) -> None:
    with pytest.raises(ValueError) as wanted:  # noqa: PT011 - whichever it is
        json.loads(body)
    with pytest.raises(type(wanted.value)) as found:
        parse_body(body)
    assert str(found.value) == str(wanted.value)


def test_the_environment_is_read_once_when_it_shall_be() -> None:
    from vllm import envs

    vllm_internals.remember_environment()
    try:
        assert envs._is_envs_cache_enabled()
    finally:
        envs.disable_envs_cache()


def test_this_vllm_is_built_for_cpus_or_has_a_device() -> None:
    from vllm.platforms import current_platform

    assert vllm_internals.is_built_for_cpus() is not current_platform.is_cuda_alike()


def test_what_vllm_does_for_an_architecture_is_done_before_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.models import config

    done: list[str] = []

    class Present(config.VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            done.append("vLLM's")

    monkeypatch.setitem(config.MODELS_CONFIG_MAP, "Some", Present)
    vllm_internals.adapt_engine_config("Some", lambda _: done.append("first"))
    vllm_internals.adapt_engine_config("Some", lambda _: done.append("second"))
    config.MODELS_CONFIG_MAP["Some"].verify_and_update_config(None)
    assert done == ["vLLM's", "second"]
    assert "UnlimitedOCRForCausalLM" in config.MODELS_CONFIG_MAP, "vLLM has settings for it that must stay"


def test_a_checkpoints_architecture_is_read_without_loading_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["DeepseekOCRForCausalLM"]}')
    assert vllm_internals.read_architectures(str(tmp_path), None) == ["DeepseekOCRForCausalLM"]
    (tmp_path / "config.json").write_text("{}")
    assert vllm_internals.read_architectures(str(tmp_path), None) == []
    (tmp_path / "config.json").unlink()
    assert vllm_internals.read_architectures(str(tmp_path), None) is None
