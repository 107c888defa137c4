"""Every interface of vLLM that this project touches although vLLM does not promise it.

Written for vLLM 0.32.0. `tests/unit/plugin/test_private.py` fails loudly when one of them moves. Each part is imported
where it is asked for, since the processes that use one part have no use for the others.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

VLLM_VERSION = "0.32.0"


def encoder_layers() -> tuple[Any, Any, Any]:
    """vLLM's SAM-style encoder, CLIP-style encoder and projector, as classes."""
    from vllm.model_executor.models.deepencoder import DeepCLIPVisionTransformer, ImageEncoderViT
    from vllm.model_executor.models.deepseek_vl2 import MlpProjector

    return ImageEncoderViT, DeepCLIPVisionTransformer, MlpProjector


def mark_image_tower(model: Any, vllm_config: Any) -> contextlib.AbstractContextManager[None]:
    """Modules made inside are the vision tower: skipped when a deployment allows no images."""
    return model._mark_tower_model(vllm_config, "image")


def mark_language_model(model: Any, vllm_config: Any) -> contextlib.AbstractContextManager[None]:
    """Modules made inside are the decoder."""
    return model._mark_language_model(vllm_config)


def allowed_image_formats() -> tuple[str, ...]:
    """Names of Pillow's formats that vLLM lets in."""
    from vllm.multimodal.image import ALLOWED_IMAGE_FORMATS

    return ALLOWED_IMAGE_FORMATS


def replace_renderer(module: str, name: str) -> None:
    """Have this class, a subclass of vLLM's `HfRenderer`, render for every model with a Hugging Face tokenizer."""
    from vllm.renderers.registry import RENDERER_REGISTRY

    RENDERER_REGISTRY.renderers["hf"] = (module, name)  # `register` would warn of what is meant


def known_server_args() -> frozenset[str]:
    """Names that `engine_args` in the settings may use: every option of vLLM's OpenAI server."""
    return frozenset(vars(parse_server_args([])))


def parse_server_args(arguments: list[str]) -> Any:
    """Command line arguments of vLLM's OpenAI server as its namespace. Raises SystemExit when they are wrong."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)


@contextlib.asynccontextmanager
async def run_engine(arguments: Any) -> AsyncIterator[tuple[Any, Any]]:
    """Start an `AsyncLLM` and build vLLM's own OpenAI app around it: yields (engine, ASGI app).

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
        # vLLM's own launcher leaves its uvicorn server here and its error handler tells it to stop when the engine
        # has died. Ours is stopped by the replica, so the handler only needs something to talk to.
        app.state.server = _ServerStandIn()
        yield engine, app


class _ServerStandIn:
    should_exit = False


def adapt_engine_config(architecture: str, adapt: Callable[[Any], None]) -> None:
    """Have vLLM call `adapt` with the `VllmConfig` of every engine for this architecture, while it is being made."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    def verify_and_update_config(vllm_config: Any) -> None:
        adapt(vllm_config)

    members = {"verify_and_update_config": staticmethod(verify_and_update_config)}
    MODELS_CONFIG_MAP[architecture] = type("AdaptedConfig", (VerifyAndUpdateConfig,), members)


def build_watched_scheduler(must_end: Callable[[Any, int], bool], stop_reason: str, **arguments: Any) -> Any:
    """vLLM's scheduler, which ends a request as too long, with this stop reason, when `must_end` says so.

    `must_end` is asked with the request and the number of tokens that it has just got, unless these ended it anyway.
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
            new_token_ids, is_stopped = super()._update_request_with_output(request, new_token_ids, is_stale)
            if not is_stopped and must_end(request, len(new_token_ids)):
                request.status, request.stop_reason = RequestStatus.FINISHED_LENGTH_CAPPED, stop_reason
                is_stopped = True
            return new_token_ids, is_stopped

    return WatchedScheduler(**arguments)
