"""Converts settings to the command line of vLLM's OpenAI server, which validates it. Pure."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from serving.errors import SettingsError
from serving.settings.stack import EngineSettings, ModelSettings, Settings

_DEFAULTS: dict[str, Any] = {
    # Decoding is greedy unless the request says otherwise: a page has one text.
    "override_generation_config": {"temperature": 0.0},
    # vLLM's log lines per request are disabled; the router logs requests.
    "disable_uvicorn_access_log": True,
    "disable_fastapi_docs": True,
    # Requests may choose a resolution mode; the processor refuses any other option.
    "trust_request_mm_kwargs": True,
    # Usage tells how many of the prompt's tokens belong to images.
    "enable_prompt_tokens_details": True,
}


def build_arguments(
    name: str, model: ModelSettings, engine: EngineSettings, checkpoint: str, traces_url: str | None = None
) -> list[str]:
    """Build the arguments of one replica's server: our defaults, overridden by the settings, overridden by the
    stack."""
    given = {key.replace("-", "_"): value for key, value in model.engine_args.items()}
    # vLLM creates a span for a request with a `traceparent`, below the router's span.
    flags = list(_flags({**_DEFAULTS, "otlp_traces_endpoint": traces_url, **given}))
    names = [name, *model.aliases]
    flags += ["--model", checkpoint, "--served-model-name", *names]
    if engine.api_key is not None:
        flags.append(f"--api-key={engine.api_key.get_secret_value()}")  # a key may start with a dash
    return flags


def _flags(arguments: Mapping[str, Any]) -> Iterator[str]:
    """Convert a mapping to flags: `max_model_len: 2048` -> `--max-model-len 2048`, booleans to `--x` or `--no-x`."""
    for key, value in arguments.items():
        flag = key.replace("_", "-")
        if value is True:
            yield f"--{flag}"
        elif value is False:
            yield f"--no-{flag}"
        elif isinstance(value, list):
            yield f"--{flag}"
            yield from map(_word, value)
        elif value is not None:
            yield f"--{flag}"
            yield _word(value)


def _word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list) else str(value)


def check_engine_args(settings: Settings) -> None:
    """Check the names in `engine_args` against those of the installed vLLM.

    Raises:
        SettingsError: vLLM does not know a name; the message suggests the closest one.
    """
    from serving.plugin.interfaces.vllm_internals import known_server_args

    known = known_server_args()
    for name, model in settings.models.items():
        for key in model.engine_args:
            if key.replace("-", "_") not in known:
                near = difflib.get_close_matches(key.replace("-", "_"), known, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise SettingsError(f"models.{name}.engine_args.{key}: vLLM has no such argument{hint}")
