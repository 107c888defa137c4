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


def use_litellm_ocr(base_url: str, document: str) -> dict[str, Any]:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    import litellm

    answer = litellm.ocr(
        model=f"mistral/{MODEL}",
        document={"type": "document_url", "document_url": document},
        api_base=base_url,
        api_key="unused",
        pages=[1],
        include_image_base64=True,
    )
    return {
        "pages": [(page.index, page.markdown) for page in answer.pages],
        "usage": answer.usage_info.pages_processed if answer.usage_info is not None else None,
    }


def use_langchain(base_url: str, page: str) -> dict[str, Any]:
    import openai
    from langchain_core.messages import HumanMessage
    from langchain_openai import ChatOpenAI

    def build(model: str, **options: Any) -> ChatOpenAI:
        return ChatOpenAI(model=model, base_url=base_url, api_key="unused", temperature=0, **options)

    chat = build(MODEL, stream_usage=True)
    message = HumanMessage([{"type": "image_url", "image_url": {"url": page}}, {"type": "text", "text": PROMPT}])
    whole = chat.invoke([message])
    pieces = list(chat.stream([message]))
    batch = chat.batch([[message], [message]])
    unasked = list(build(MODEL, stream_usage=False).stream([message]))
    response = build(MODEL, use_responses_api=True).invoke([message])
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
        "tokens unasked": sum(piece.usage_metadata["output_tokens"] for piece in unasked if piece.usage_metadata),
        "response": response.text,
        "tokens of the response": response.usage_metadata["output_tokens"],
        "error": error,
    }


if __name__ == "__main__":
    name, address, file = sys.argv[1:]
    kind = "application/pdf" if file.endswith(".pdf") else "image/png"
    data = f"data:{kind};base64," + base64.b64encode(Path(file).read_bytes()).decode()
    uses = {"litellm": use_litellm, "langchain": use_langchain, "litellm ocr": use_litellm_ocr}
    print(json.dumps(uses[name](address, data)))
