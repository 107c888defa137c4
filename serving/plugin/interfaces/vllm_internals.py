"""Every interface of vLLM that this project uses although vLLM does not promise to keep it.

Written for vLLM 0.32.0. If one of them changes, `tests/unit/plugin/interfaces/test_vllm_internals.py` fails. Each
function imports the parts of vLLM that it needs, because the processes that use one of them do not need the others.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import orjson

VLLM_VERSION = "0.32.0"
_CHUNK_FIELDS = {"id", "object", "created", "model"}
_NOTHING_ELSE = {"logprobs": None, "finish_reason": None, "token_ids": None}
"""Fields of a streamed choice that are set to None while it contains only text."""


def encoder_layers() -> tuple[Any, Any, Any]:
    """Return the classes of vLLM's SAM-style encoder, CLIP-style encoder and projector."""
    from vllm.model_executor.models.deepencoder import DeepCLIPVisionTransformer, ImageEncoderViT
    from vllm.model_executor.models.deepseek_vl2 import MlpProjector

    return ImageEncoderViT, DeepCLIPVisionTransformer, MlpProjector


def mark_image_tower(model: Any, vllm_config: Any) -> contextlib.AbstractContextManager[None]:
    """Mark modules created in this context as the vision tower, which is skipped if a deployment allows no images."""
    return model._mark_tower_model(vllm_config, "image")


def mark_language_model(model: Any, vllm_config: Any) -> contextlib.AbstractContextManager[None]:
    """Mark modules created in this context as the decoder."""
    return model._mark_language_model(vllm_config)


def allowed_image_formats() -> tuple[str, ...]:
    """Return Pillow's names of the formats that vLLM allows."""
    from vllm.multimodal.image import ALLOWED_IMAGE_FORMATS

    return ALLOWED_IMAGE_FORMATS


def replace_renderer(module: str, name: str) -> None:
    """Make vLLM use this subclass of its `HfRenderer` for every model with a Hugging Face tokenizer."""
    from vllm.renderers.registry import RENDERER_REGISTRY

    RENDERER_REGISTRY.renderers["hf"] = (module, name)  # `register` would warn about the replacement


def read_architectures(checkpoint: str, revision: str | None) -> list[str] | None:
    """Return the architectures that a checkpoint's `config.json` names, before anything of it is loaded; None if the
    file cannot be had, which vLLM will explain."""
    from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

    found = get_hf_file_to_dict("config.json", checkpoint, revision)
    return list(found.get("architectures") or ()) if isinstance(found, dict) else None


def copy_to_device(values: Any, device: Any) -> Any:
    """Return a NumPy array's values as a tensor on a device without waiting for it: they are copied to pinned memory
    first, and the array may change at once."""
    from vllm.utils.torch_utils import async_tensor_h2d

    return async_tensor_h2d(values.copy(), device)


def is_built_for_cpus() -> bool:
    """Return whether the installed vLLM computes on the processor instead of a device."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def set_chat_template(model_type: str, file: Path) -> None:
    """Make vLLM use this template for models of a type whose tokenizer has none."""
    from vllm.transformers_utils.chat_templates import registry

    # `register_chat_template_fallback_path` would warn about the replacement
    registry._MODEL_TYPE_TO_CHAT_TEMPLATE_FALLBACK[model_type] = file


def known_server_args() -> frozenset[str]:
    """Return the names that `engine_args` in the settings may use: every option of vLLM's OpenAI server."""
    return frozenset(vars(parse_server_args([])))


def parse_server_args(arguments: list[str]) -> Any:
    """Parse command line arguments of vLLM's OpenAI server into its namespace.

    Raises:
        SystemExit: the arguments are invalid.
    """
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)


def configure_logging(arguments: Any) -> None:
    """Configure vLLM's logging. This happens once per process, so the start of the engine will not do it again."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.logger import configure_logging_if_needed

    configure_logging_if_needed(AsyncEngineArgs.from_cli_args(arguments).create_logging_config())


@contextlib.asynccontextmanager
async def run_engine(arguments: Any) -> AsyncIterator[tuple[Any, Any]]:
    """Start an `AsyncLLM`, build vLLM's own OpenAI app around it, and yield (engine, ASGI app).

    Leaving the context stops the engine's processes.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client_from_engine_args
    from vllm.entrypoints.launchers.app import build_app

    engine_args = AsyncEngineArgs.from_cli_args(arguments)
    async with build_async_engine_client_from_engine_args(engine_args) as engine:
        tasks = await engine.get_supported_tasks()
        app = build_app(arguments, tasks, engine.model_config)
        await init_app_state(engine, app.state, arguments, tasks)
        # vLLM's own launcher stores its uvicorn server here, and its error handler stops that when the engine has
        # died. Our server is stopped by the replica, so the handler gets a placeholder.
        app.state.server = _ServerStandIn()
        yield engine, app


class _ServerStandIn:
    """Takes the place of the uvicorn server that vLLM's error handler stops."""

    should_exit = False


def adapt_engine_config(architecture: str, adapt: Callable[[Any], None]) -> None:
    """Make vLLM call `adapt` with the `VllmConfig` of every engine for this architecture while it creates it, after
    what vLLM itself does for the architecture. A later call replaces the callback."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    present = MODELS_CONFIG_MAP.get(architecture, VerifyAndUpdateConfig)
    original: Any = getattr(present, "adapted", present)

    def verify_and_update_config(vllm_config: Any) -> None:
        original.verify_and_update_config(vllm_config)
        adapt(vllm_config)

    members = {"verify_and_update_config": staticmethod(verify_and_update_config), "adapted": original}
    MODELS_CONFIG_MAP[architecture] = type("AdaptedConfig", (original,), members)


def build_watched_scheduler(must_end: Callable[[Any], bool], stride: int, stop_reason: str, **arguments: Any) -> Any:
    """Build vLLM's scheduler, which ends a request as too long, with this stop reason, when `must_end` returns true.

    `must_end` is called with the request whenever its number of output tokens is a multiple of `stride`, unless those
    end the request anyway. Tokens that came in the same step after the last one are dropped, so that an answer ends at
    the same token whether its tokens come one by one or, with speculative decoding, several in a step.
    """
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import RequestStatus

    is_async = arguments["vllm_config"].scheduler_config.async_scheduling
    base: Any = AsyncScheduler if is_async else Scheduler

    class WatchedScheduler(base):
        def _update_request_with_output(
            self, request: Any, new_token_ids: list[int], is_stale: bool = False
        ) -> tuple[list[int], bool]:
            num_taken, is_stopped = 0, False
            while num_taken < len(new_token_ids) and not is_stopped:
                until_check = stride - request.num_output_tokens % stride
                part = new_token_ids[num_taken : num_taken + until_check]
                part, is_stopped = super()._update_request_with_output(request, part, is_stale)
                num_taken += len(part)
                if len(part) == until_check and not is_stopped and must_end(request):
                    request.status, request.stop_reason = RequestStatus.FINISHED_LENGTH_CAPPED, stop_reason
                    is_stopped = True
            del new_token_ids[num_taken:]  # as the original does
            return new_token_ids, is_stopped

    return WatchedScheduler(**arguments)


def watch_early_length_ends(max_model_len: int, note: Callable[[Sequence[int]], None]) -> None:
    """Call `note` with the output tokens of each request that ended as too long before it reached its limit.

    vLLM itself ends a request as too long only when it has reached `max_tokens` or the model's length; our scheduler
    does so earlier. Call this in the API process before it accepts requests; a later call replaces the callback. There
    is no cost before a request ends.
    """
    from vllm.v1.engine import FinishReason
    from vllm.v1.engine.output_processor import OutputProcessor

    present = OutputProcessor._update_stats_from_finished
    original = getattr(present, "__wrapped__", present)

    @functools.wraps(original)
    def update_stats_from_finished(self: Any, req_state: Any, finish_reason: Any, iteration_stats: Any) -> None:
        original(self, req_state, finish_reason, iteration_stats)
        if finish_reason is FinishReason.LENGTH:
            output = req_state.detokenizer.output_token_ids
            left = min(req_state.max_tokens_param, max_model_len - req_state.prompt_len) - len(output)
            if left > 0:
                note(output)

    OutputProcessor._update_stats_from_finished = update_stats_from_finished


class SequenceWatcher(Protocol):
    """Receives the begin and end of every sequence of an engine, see `watch_sequences`."""

    def begin(self, sequence_id: str, engine_id: str, num_image_tokens: int, state: Any) -> None: ...

    def end(self, sequence_id: str, finish_reason: str) -> None: ...


def watch_sequences(engine: Any, watcher: SequenceWatcher) -> None:
    """Report to `watcher` when the front end of an `AsyncLLM` accepts a sequence and when it ends or is aborted.

    `state` is the sequence's state for `sequence_counts`. There is no cost per token.
    """
    processor = engine.output_processor
    add, abort, note_finished = processor.add_request, processor.abort_requests, processor._update_stats_from_finished

    def add_request(request: Any, *arguments: Any, **named: Any) -> None:
        is_new = not processor.has_request(request.request_id)
        add(request, *arguments, **named)
        if is_new:
            images = [item for item in request.mm_features or () if item.modality == "image"]
            num_image_tokens = sum(item.mm_position.length for item in images)
            state = processor.request_states[request.request_id]
            watcher.begin(request.request_id, request.external_req_id, num_image_tokens, state)

    def abort_requests(request_ids: Iterable[str], internal: bool) -> list[str]:
        given = list(request_ids)
        ids = given if internal else [one for name in given for one in processor.external_req_ids.get(name, ())]
        ending = [one for one in ids if processor.has_request(one)]
        aborted = abort(given, internal)  # calls this function again for the children of a request with several answers
        for one in ending:
            watcher.end(one, "abort")
        return aborted

    def update_stats_from_finished(req_state: Any, finish_reason: Any, iteration_stats: Any) -> None:
        note_finished(req_state, finish_reason, iteration_stats)
        watcher.end(req_state.request_id, str(finish_reason))

    processor.add_request = add_request
    processor.abort_requests = abort_requests
    processor._update_stats_from_finished = update_stats_from_finished


def sequence_counts(state: Any) -> tuple[int, int, int]:
    """Return a sequence's prompt, cached and completion tokens that vLLM's `vllm:*_tokens_total` include so far."""
    is_counted = state.stats is not None  # otherwise statistics are off, and the detokenizer counts
    completion = state.stats.num_generation_tokens if is_counted else state.detokenizer.num_output_tokens()
    return (0 if state.is_prefilling else state.prompt_len), state.num_cached_tokens, completion


def kv_cache_tokens(vllm_config: Any) -> int:
    """Return how many tokens fit into the KV cache of a started engine."""
    cache = vllm_config.cache_config
    return int(cache.kv_cache_size_tokens or (cache.num_gpu_blocks or 0) * cache.block_size)


def end_streams_with_usage() -> None:
    """Make vLLM's server end every stream with a usage frame, whether the request asks for it or not.

    Its own `--enable-force-include-usage` also adds usage to every frame of the stream, which costs the engine and
    every reader of the frames tens of microseconds per token.
    """
    from vllm.entrypoints.openai.chat_completion import serving as chat
    from vllm.entrypoints.openai.completion import serving as completion

    def should_include_usage(options: Any, is_forced: bool) -> tuple[bool, bool]:
        is_asked = options is not None and bool(options.include_usage)
        return True, is_forced or (is_asked and bool(options.continuous_usage_stats))

    for module in (chat, completion):
        if not hasattr(module, "should_include_usage"):
            raise AttributeError(f"{module.__name__} decides on usage frames without should_include_usage")
        module.should_include_usage = should_include_usage


def remember_environment() -> None:
    """Make vLLM's front end read its environment once, as its engine process does, instead of at every step."""
    from vllm.envs import enable_envs_cache

    enable_envs_cache()


def read_bodies_with_orjson() -> None:
    """Make Starlette's requests, and thus vLLM's server, parse bodies with orjson: a page takes a third of the time.

    Bodies that orjson rejects (NaN, UTF-16, invalid JSON) are still parsed by the standard library, with its errors.
    Integers beyond 64 bits become floats.
    """
    from starlette.requests import Request

    original = getattr(Request.json, "__wrapped__", Request.json)

    @functools.wraps(original)
    async def json(self: Any) -> Any:
        if not hasattr(self, "_json"):  # Starlette's own cache
            try:
                self._json = orjson.loads(await self.body())
            except orjson.JSONDecodeError:
                return await original(self)
        return self._json

    Request.json = json  # type: ignore[method-assign]


def write_text_chunks() -> None:
    """Make vLLM's server write the chunks of a stream that contain only text without pydantic models.

    Nearly all chunks are of this kind. The bytes are the same, for a tenth of the CPU time.

    Raises:
        AttributeError: vLLM creates its chunks differently.
    """
    from vllm.entrypoints.openai.chat_completion import serving as chat

    if not isinstance(chat.DeltaMessage, type):
        return  # already done
    delta_type, choice_type, chunk_type = (
        chat.DeltaMessage,
        chat.ChatCompletionResponseStreamChoice,
        chat.ChatCompletionStreamResponse,
    )

    def make_delta(**fields: Any) -> Any:
        is_text = len(fields) == 1 and type(fields.get("content")) is str
        return _TextDelta(fields["content"]) if is_text else delta_type(**fields)

    def make_choice(**fields: Any) -> Any:
        delta = fields["delta"]
        if type(delta) is not _TextDelta:
            return choice_type(**fields)
        if fields == {"index": fields["index"], "delta": delta, **_NOTHING_ELSE}:
            return _TextChoice(fields["index"], delta.content)
        return choice_type(**{**fields, "delta": delta_type(content=delta.content)})

    def make_chunk(**fields: Any) -> Any:
        choices = fields["choices"]
        is_text = len(choices) == 1 and type(choices[0]) is _TextChoice
        return _TextChunk(make_whole, **fields) if is_text else chunk_type(**fields)

    def make_whole(choice: _TextChoice, **fields: Any) -> Any:
        whole = choice_type(index=choice.index, delta=delta_type(content=choice.content), **_NOTHING_ELSE)
        return chunk_type(**fields, choices=[whole])

    choice = make_choice(index=0, delta=make_delta(content="é"), **_NOTHING_ELSE)
    chunk = make_chunk(id="i", object="chat.completion.chunk", created=1, model="m", choices=[choice])
    if chunk.model_dump_json(exclude_unset=True) != chunk.whole().model_dump_json(exclude_unset=True):
        raise AttributeError(f"{chat.__name__} writes its chunks differently: write_text_chunks does not fit it")
    chat.DeltaMessage, chat.ChatCompletionResponseStreamChoice = make_delta, make_choice
    chat.ChatCompletionStreamResponse = make_chunk


class _TextDelta:
    __slots__ = ("content",)
    reasoning = None
    tool_calls = ()

    def __init__(self, content: str) -> None:
        self.content = content


class _TextChoice:
    __slots__ = ("content", "index")
    finish_reason = None
    tool_calls = ()

    def __init__(self, index: int, content: str) -> None:
        self.index = index
        self.content = content


class _TextChunk:
    """A chunk of a stream with one choice of text, with the interface that vLLM's server uses."""

    __slots__ = ("_choice", "_fields", "_make_whole", "usage")

    def __init__(self, make_whole: Callable[..., Any], choices: list[_TextChoice], **fields: Any) -> None:
        self._make_whole = make_whole
        self._choice = choices[0]
        self._fields = fields
        self.usage: Any = None

    def whole(self) -> Any:
        """Return the chunk as vLLM's own model."""
        chunk = self._make_whole(self._choice, **self._fields)
        if self.usage is not None:
            chunk.usage = self.usage
        return chunk

    def model_dump_json(self, *, exclude_unset: bool) -> str:
        fields, choice = self._fields, self._choice
        if self.usage is not None or fields.keys() != _CHUNK_FIELDS or not exclude_unset:
            dumped: str = self.whole().model_dump_json(exclude_unset=exclude_unset)
            return dumped
        return (
            f'{{"id":{_quote(fields["id"])},"object":{_quote(fields["object"])},"created":{fields["created"]},'
            f'"model":{_quote(fields["model"])},"choices":[{{"index":{choice.index},'
            f'"delta":{{"content":{orjson.dumps(choice.content).decode()}}},'
            f'"logprobs":null,"finish_reason":null,"token_ids":null}}]}}'
        )


@functools.lru_cache(maxsize=4096)
def _quote(text: str) -> str:
    return orjson.dumps(text).decode()
