"""The family's chat template, against vLLM's own where that accepts a chat."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from serving.plugin import CHAT_TEMPLATE

BOS = "<bos>"


def compile_template(file: Path) -> Any:
    """As transformers compiles chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def refuse(message: str) -> None:
        raise ValueError(message)

    environment.globals["raise_exception"] = refuse
    return environment.from_string(file.read_text())


def find_stock_template() -> Path:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations
    (folder,) = spec.submodule_search_locations
    return Path(folder, "transformers_utils", "chat_templates", "template_deepseek_ocr.jinja")


OURS = compile_template(CHAT_TEMPLATE)
TEXTS = ["<image>\nFree OCR.", "", " a \n", "{{ 1 }}<|User|>"]


def render(*messages: tuple[str, str | None]) -> str:
    rendered: str = OURS.render(
        messages=[{"role": role, "content": content} for role, content in messages], bos_token=BOS
    )
    return rendered


def test_it_is_equal_to_the_stock_template_where_that_accepts_a_chat() -> None:
    stock = compile_template(find_stock_template())
    num_equal = 0
    for system, length in itertools.product([False, True], range(1, 5)):
        roles = [*(["system"] if system else []), *(("user", "assistant")[i % 2] for i in range(length))]
        for contents in itertools.islice(itertools.product(TEXTS, repeat=len(roles)), 40):
            messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
            assert OURS.render(messages=messages, bos_token=BOS) == stock.render(messages=messages, bos_token=BOS)
            num_equal += 1
    assert num_equal > 100


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([("user", "<image>"), ("user", "Free OCR.")], "<image>\nFree OCR."),
        ([("assistant", "Hello."), ("user", "Bye.")], "Hello.Bye."),
        ([("user", "a"), ("system", "b"), ("user", "c")], "abc"),
        ([("developer", "a"), ("system", "b"), ("user", "c")], "a\nbc"),
        ([("user", "a"), ("assistant", None), ("tool", "3"), ("tool", "4"), ("assistant", "b")], "a3\n4b"),
        ([("user", "a"), ("user", ""), ("user", "b")], "a\nb"),
        ([("system", "a")], "a"),
    ],
)
def test_chats_that_the_stock_template_refuses(messages: list[tuple[str, str | None]], expected: str) -> None:
    assert render(*messages) == BOS + expected
