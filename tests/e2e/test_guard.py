"""The n-gram guard and the loop stop, on by default, on output that is forced to go round in circles."""

from __future__ import annotations

import itertools
from typing import Any

import openai
from tokenizers import Tokenizer

from e2e.conftest import ROOT, Stack
from e2e.pages import build_page, encode, page_message

MODEL = "nano"
PAGE = page_message(encode(build_page()))
TEXT = [{"role": "user", "content": "Go"}]
NGRAM, WINDOW, STOP_AFTER = 30, 90, 512


def find_letter() -> int:
    tokenizer = Tokenizer.from_file(str(ROOT / "checkpoints/nano/tokenizer.json"))
    (letter,) = tokenizer.encode("a", add_special_tokens=False).ids
    return int(letter)


def ask(client: openai.OpenAI, messages: list[dict[str, Any]], max_tokens: int, **xargs: int) -> Any:
    """An answer that wants to be nothing but the letter a."""
    return client.chat.completions.create(
        model=MODEL,
        messages=messages,  # type: ignore[arg-type]
        max_tokens=max_tokens,
        logit_bias={str(find_letter()): 100},
        extra_body={"vllm_xargs": xargs, "return_token_ids": True},
    )


def longest_run(answer: Any) -> int:
    """Most letters in a row, by token: text would hide special tokens between them."""
    letter = find_letter()
    return max(len(list(run)) for token, run in itertools.groupby(answer.choices[0].token_ids) if token == letter)


def test_a_page_is_guarded_without_asking(client: openai.OpenAI) -> None:
    assert longest_run(ask(client, PAGE, WINDOW)) == NGRAM


def test_a_chat_without_a_page_is_not_guarded(client: openai.OpenAI) -> None:
    assert longest_run(ask(client, TEXT, 100)) == 100


def test_a_request_can_switch_the_guard_off_or_choose_its_size(client: openai.OpenAI) -> None:
    assert longest_run(ask(client, PAGE, 100, ngram_size=0)) == 100
    assert longest_run(ask(client, TEXT, WINDOW, ngram_size=5)) == 5


def test_a_loop_that_nothing_breaks_is_cut_and_said_so(client: openai.OpenAI, stack: Stack) -> None:
    counters = "serving_repetition_stops_total", "serving_wasted_tokens_total"
    before = [stack.metric(name) for name in counters]
    answer = ask(client, PAGE, STOP_AFTER + 100, ngram_size=0)
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.stop_reason) == ("length", "repetition")
    assert 64 <= answer.usage.completion_tokens <= STOP_AFTER + 16
    unstopped = ask(client, PAGE, STOP_AFTER + 100, ngram_size=0, repeated_tokens=0)
    assert unstopped.usage.completion_tokens == STOP_AFTER + 100
    counted = [stack.metric(name) - value for name, value in zip(counters, before, strict=True)]
    assert counted == [1, answer.usage.completion_tokens - 1]  # the first letter repeats nothing
