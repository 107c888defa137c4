"""openai-agents as its documentation uses it: `python outside_agents.py BASE_URL`, run by `test_outside_clients.py`."""

from __future__ import annotations

import asyncio
import json
import sys

from agents import Agent, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, set_tracing_disabled
from openai import AsyncOpenAI


async def use(base_url: str) -> None:
    set_tracing_disabled(True)
    client = AsyncOpenAI(base_url=base_url, api_key="unused", max_retries=0)
    texts, tokens = [], []
    for kind in (OpenAIResponsesModel, OpenAIChatCompletionsModel):
        agent = Agent(name="reader", instructions="Be brief.", model=kind("nano", client))
        whole, stream = await Runner.run(agent, "Hello"), Runner.run_streamed(agent, "Hello")
        async for _ in stream.stream_events():
            pass
        texts += [whole.final_output, stream.final_output]
        tokens += [whole.context_wrapper.usage.output_tokens, stream.context_wrapper.usage.output_tokens]
    print(json.dumps({"texts": texts, "tokens": tokens}))


if __name__ == "__main__":
    asyncio.run(use(sys.argv[1]))
