"""Clients of others, as their own documentation uses them: run by `test_outside_clients.py` in their own environment.

`python outside_clients.py NAME BASE_URL PAGE_FILE` reads a page whole and as a stream, and makes one mistake; it prints
what it got as one line of JSON. Nothing in here knows this project.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from pathlib import Path
from typing import Any

MODEL, PROMPT = "nano", "Free OCR."


def use_litellm(base_url: str, page: str) -> dict[str, Any]:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or it asks GitHub first
    import litellm

    content = [{"type": "image_url", "image_url": {"url": page}}, {"type": "text", "text": PROMPT}]
    request: dict[str, Any] = {
        "model": f"openai/{MODEL}",
        "api_base": base_url,
        "api_key": "unused",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
    }
    whole = litellm.completion(**request)
    pieces = list(litellm.completion(**request, stream=True, stream_options={"include_usage": True}))
    try:
        litellm.completion(**{**request, "model": "openai/nothing"})
        error = "none"
    except litellm.NotFoundError:
        error = "not found"
    return {
        "whole": whole.choices[0].message.content,
        "tokens": whole.usage.completion_tokens,
        "stream": "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices),
        "num_pieces": len(pieces),
        "error": error,
    }


def use_langchain(base_url: str, page: str) -> dict[str, Any]:
    import openai
    from langchain_core.messages import HumanMessage
    from langchain_openai import ChatOpenAI

    def build(model: str) -> ChatOpenAI:
        return ChatOpenAI(model=model, base_url=base_url, api_key="unused", temperature=0, stream_usage=True)

    chat = build(MODEL)
    message = HumanMessage([{"type": "image_url", "image_url": {"url": page}}, {"type": "text", "text": PROMPT}])
    whole = chat.invoke([message])
    pieces = list(chat.stream([message]))
    batch = chat.batch([[message], [message]])
    try:
        build("nothing").invoke([message])
        error = "none"
    except openai.NotFoundError:
        error = "not found"
    return {
        "whole": whole.content,
        "tokens": whole.usage_metadata["output_tokens"],
        "stream": "".join(piece.content for piece in pieces),
        "num_pieces": len(pieces),
        "batch": [answer.content for answer in batch],
        "error": error,
    }


if __name__ == "__main__":
    name, address, file = sys.argv[1:]
    data = "data:image/png;base64," + base64.b64encode(Path(file).read_bytes()).decode()
    print(json.dumps({"litellm": use_litellm, "langchain": use_langchain}[name](address, data)))
