"""Renders answers as vLLM's OpenAI server (0.32) does, by hand: a frame costs one concatenation. Pure."""

from __future__ import annotations

from typing import Any

import orjson

from serving.engine.scripted.requests import ScriptedRequest

DONE = b"data: [DONE]\n\n"
_WORDS = (" the", " page", " reads", " as", " it", " was", " printed", " there")
_TOKEN_END = b',"logprobs":null,"finish_reason":null,"token_ids":null}]'
_TEXT_END = b',"logprobs":null,"finish_reason":null,"stop_reason":null,"prompt_token_ids":null,"token_ids":null}]'


def word(number: int) -> str:
    """Return token `number` (from 1) of every answer."""
    return _WORDS[(number - 1) % len(_WORDS)]


def build_text(num_tokens: int) -> str:
    """Return the text of a whole answer."""
    whole, rest = divmod(num_tokens, len(_WORDS))
    return "".join(_WORDS) * whole + "".join(_WORDS[:rest])


def build_usage(request: ScriptedRequest, completion_tokens: int) -> dict[str, Any]:
    """Return vLLM's `usage`; that of a completion, unlike a chat, does not mention images."""
    details: dict[str, Any] = {"cached_tokens": 0}
    if request.image_tokens:
        details["multimodal_tokens"] = {"image": request.image_tokens}
    return {
        "prompt_tokens": request.prompt_tokens,
        "total_tokens": request.prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
        "prompt_tokens_details": details,
    }


def build_answer(request: ScriptedRequest, answer_id: str, created_s: int) -> bytes:
    """Return a whole answer."""
    text = build_text(request.output_tokens)
    end = {"logprobs": None, "finish_reason": request.finish_reason, "stop_reason": None, "token_ids": None}
    says: dict[str, Any] = {"message": {"role": "assistant", "content": text, "refusal": None}}
    if not request.is_chat:
        says = {"text": text}
    return orjson.dumps(
        {
            "id": answer_id,
            "object": "chat.completion" if request.is_chat else "text_completion",
            "created": created_s,
            "model": request.model,
            "choices": [{"index": index, **says, **end} for index in range(request.num_choices)],
            "system_fingerprint": None,
            "usage": build_usage(request, request.num_choices * request.output_tokens),
        }
    )


def build_error(status: int, message: str, kind: str, param: str | None = None) -> bytes:
    """Return vLLM's error body, which has the status as `code`."""
    return orjson.dumps({"error": {"message": message, "type": kind, "param": param, "code": status}})


class StreamFrames:
    """The frames of one streamed answer."""

    def __init__(
        self, request: ScriptedRequest, answer_id: str, created_s: int, *, has_continuous_usage: bool = False
    ) -> None:
        """has_continuous_usage: every frame contains the usage so far."""
        self._request = request
        self._has_continuous_usage = has_continuous_usage
        start = {
            "id": answer_id,
            "object": "chat.completion.chunk" if request.is_chat else "text_completion",
            "created": created_s,
            "model": request.model,
        }
        self._head = b"data: " + orjson.dumps(start)[:-1] + b',"choices":['
        self._ready: tuple[bytes, ...] = ()
        """Prebuilt frames of a single choice, one for each word, if they contain nothing else."""
        if request.num_choices == 1 and not has_continuous_usage:
            self._ready = tuple(self._render(self._token(0, number), number) for number in range(1, len(_WORDS) + 1))

    def first(self) -> bytes:
        """Return the frames with the role of every choice; a completion has none."""
        if not self._request.is_chat:
            return b""
        role = b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
        prompt = b',"prompt_token_ids":null,"prompt_text":null'
        return b"".join(self._render(role % index + prompt, 0) for index in range(self._request.num_choices))

    def token(self, index: int, number: int) -> bytes:
        """Return the frame of token `number` (from 1) of a choice; the last one contains the finish reason."""
        if number == self._request.output_tokens:
            return self._render(self._last(index, number), number)
        if self._ready:
            return self._ready[(number - 1) % len(_WORDS)]
        return self._render(self._token(index, number), number)

    def usage(self) -> bytes:
        """Return the usage frame, which has no choices and precedes the end of the stream."""
        usage = build_usage(self._request, self._request.num_choices * self._request.output_tokens)
        return self._head + b'],"usage":' + orjson.dumps(usage) + b"}\n\n"

    def _token(self, index: int, number: int) -> bytes:
        text = orjson.dumps(word(number))
        if self._request.is_chat:
            return b'{"index":%d,"delta":{"content":%b}%b' % (index, text, _TOKEN_END)
        return b'{"index":%d,"text":%b%b' % (index, text, _TEXT_END)

    def _last(self, index: int, number: int) -> bytes:
        reason = b'"finish_reason":"%b"' % self._request.finish_reason.encode()
        frame = self._token(index, number).replace(b'"finish_reason":null', reason)
        return frame.replace(b',"token_ids"', b',"stop_reason":null,"token_ids"') if self._request.is_chat else frame

    def _render(self, choice: bytes, number: int) -> bytes:
        if not self._has_continuous_usage:
            return self._head + choice + b"}\n\n"
        prompt = self._request.prompt_tokens
        usage = {"prompt_tokens": prompt, "total_tokens": prompt + number, "completion_tokens": number}
        return (
            self._head + choice + b',"usage":' + orjson.dumps({**usage, "completion_tokens_details": None}) + b"}\n\n"
        )
