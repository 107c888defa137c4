"""Fields of OpenAI's, of other providers' and of vLLM's that have no effect here. Pure.

Clients send them by habit: they were written for another provider, or send every field at its default. Such a field is
left out of what the engine gets, and the answer names it in `x-ignored-parameters`. A value is refused only if the
client would notice in the answer that it was not followed: `audio` wants speech, `priority: 5` wants to go first.

`router.unknown_fields: refuse` concerns names that are in no table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from serving.errors import InvalidRequestError
from serving.router.request.checks import Check

NO_TOOLS = "Tools are not offered: remove tools and functions, or ask for JSON with response_format."
IGNORED_HEADER = b"x-ignored-parameters"
_MAX_NAMES = 20
_MAX_NAME_CHARS = 64

NOT_NULL = frozenset(
    {
        *("add_generation_prompt", "add_special_tokens", "bad_words", "continue_final_message", "echo", "ignore_eos"),
        *("include_reasoning", "include_stop_str_in_output", "length_penalty", "min_tokens", "mm_payload", "n"),
        *("priority", "request_id", "routed_experts_prompt_start", "skip_special_tokens"),
        *("spaces_between_special_tokens", "use_beam_search"),
    }
)
"""Known fields that vLLM 0.32 refuses as null, which OpenAI takes for a missing field."""


def _ignored(key: str, value: Any) -> bool:
    return True


def _only(*harmless: Any, why: str) -> Check:
    """These values are what happens anyway; any other is refused."""

    def check(key: str, value: Any) -> bool:
        # `True == 1`, but not in JSON.
        if any(type(value) is type(same) and value == same for same in harmless):
            return True
        raise InvalidRequestError(f"{key} is not supported: {why}.", param=key, code="unsupported_parameter")

    return check


def _store(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidRequestError(f"{key} must be true or false.", param=key)
    return value


def _no_tools(key: str, value: Any) -> bool:
    if value in ([], "none", "auto"):
        return True
    raise InvalidRequestError(NO_TOOLS, param=key, code="tools_not_supported")


_engine_owned = _only(why="it controls the engine; remove it")
_guided = _only(why="use response_format or structured_outputs instead")
_off = _only(False, why="remove it, or set it to false")

FOREIGN: Mapping[str, Check] = {
    # vLLM's
    "priority": _only(0, why="the operator gives priorities to keys; remove it"),
    "use_beam_search": _off,
    "length_penalty": _ignored,  # of beam search
    "prompt_logprobs": _only(False, why="remove it; logprobs gives those of the answer"),
    "logprob_token_ids": _only([], why="remove it; top_logprobs gives the most likely tokens"),
    "watermarking": _off,
    "documents": _only([], why="put their texts into messages"),
    "chat_template": _only(why="the model's own is used; remove it"),
    "chat_template_kwargs": _ignored,
    "media_io_kwargs": _only({}, why="remove it; mm_processor_kwargs chooses a resolution mode"),
    "mm_payload": _engine_owned,
    "kv_transfer_params": _only({}, why="it controls the engine; remove it"),
    "ec_transfer_params": _only({}, why="it controls the engine; remove it"),
    "prompt_embeds": _engine_owned,
    "cache_salt": _ignored,
    "request_id": _ignored,
    "session_id": _ignored,
    "return_token_offsets": _off,
    "return_prompt_text": _off,
    "return_mm_kwargs": _off,
    "routed_experts_prompt_start": _only(0, why="remove it"),
    "trace_decode_token_ids": _only([], False, why="remove it"),
    "thinking_token_budget": _ignored,
    "guided_json": _guided,
    "guided_regex": _guided,
    "guided_choice": _guided,
    "guided_grammar": _guided,
    "guided_decoding_backend": _ignored,
    "guided_whitespace_pattern": _guided,
    # other providers'
    "reasoning": _ignored,
    "provider": _ignored,
    "transforms": _ignored,
    "route": _ignored,
    # OpenAI's
    "prompt_cache_key": _ignored,
    "prompt_cache_options": _ignored,
    "prompt_cache_retention": _ignored,
    "store": _store,
    "service_tier": _only("auto", "default", why="all requests are served in one tier; remove it"),
}
"""Of both routes; names are the clients', values what is done with them."""

FOREIGN_CHAT: Mapping[str, Check] = {
    "echo": _off,
    "functions": _no_tools,
    "function_call": _no_tools,
    "audio": _only(why="answers are text; remove it"),
    "modalities": _only([], ["text"], why="answers are text; remove it"),
    "moderation": _only(why="nothing is moderated here; remove it"),
    "web_search_options": _only(why="nothing is searched here; remove it"),
    "prediction": _ignored,
    "reasoning_effort": _ignored,
    "include_reasoning": _ignored,
    "verbosity": _ignored,
}


def build_header(names: Sequence[str]) -> tuple[bytes, bytes]:
    """The header that names ignored fields: at most twenty, percent-encoded where a header could not hold them."""
    shown = [quote(name[:_MAX_NAME_CHARS], safe="[]._-") for name in names[:_MAX_NAMES]]
    if len(names) > _MAX_NAMES:
        shown.append("...")
    return IGNORED_HEADER, ", ".join(shown).encode()
