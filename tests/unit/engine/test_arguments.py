from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import SecretStr

from serving.engine.arguments import _DEFAULTS, build_arguments, check_engine_args
from serving.errors import SettingsError
from serving.settings.stack import EngineSettings, ModelSettings, Settings

OWN = ["--model", "/weights", "--served-model-name", "nano"]


def build(engine_args: dict[str, Any], **engine: Any) -> list[str]:
    model = ModelSettings(checkpoint="nano", engine_args=engine_args)
    return build_arguments("nano", model, EngineSettings(**engine), "/weights")


def given_flags(engine_args: dict[str, Any]) -> list[str]:
    """The flags that these engine arguments alone make."""
    flags = build({**dict.fromkeys(_DEFAULTS), **engine_args})
    assert flags[-len(OWN) :] == OWN
    return flags[: -len(OWN)]


@pytest.mark.parametrize(
    ("engine_args", "flags"),
    [
        ({}, []),
        ({"max_model_len": 2048}, ["--max-model-len", "2048"]),
        ({"max-model-len": 2048}, ["--max-model-len", "2048"]),
        ({"gpu_memory_utilization": 0.9}, ["--gpu-memory-utilization", "0.9"]),
        ({"dtype": "float32"}, ["--dtype", "float32"]),
        ({"enforce_eager": True}, ["--enforce-eager"]),
        ({"enable_prefix_caching": False}, ["--no-enable-prefix-caching"]),
        ({"seed": 0}, ["--seed", "0"]),
        ({"mm_processor_cache_gb": 1}, ["--mm-processor-cache-gb", "1"]),
        ({"quantization": None}, []),
        ({"middleware": ["a.B", "c.D"]}, ["--middleware", "a.B", "c.D"]),
        ({"limit_mm_per_prompt": {"image": 2}}, ["--limit-mm-per-prompt", '{"image": 2}']),
        ({"chat_template": ""}, ["--chat-template", ""]),
        ({"b": 1, "a": 2}, ["--b", "1", "--a", "2"]),
        pytest.param(
            {"allowed_origins": [{"a": 1}]},
            ["--allowed-origins", '{"a": 1}'],
        ),
    ],
)
def test_an_engine_argument_becomes_vllms_flag(engine_args: dict[str, Any], flags: list[str]) -> None:
    assert given_flags(engine_args) == flags


def test_answers_are_greedy_unless_asked_otherwise() -> None:
    flags = build({})
    assert json.loads(flags[flags.index("--override-generation-config") + 1]) == {"temperature": 0.0}
    assert "--disable-uvicorn-access-log" in flags
    assert "--disable-fastapi-docs" in flags


@pytest.mark.parametrize("key", ["override_generation_config", "override-generation-config"])
def test_settings_go_before_our_defaults(key: str) -> None:
    flags = build({key: {"temperature": 0.5}})
    assert flags.count("--override-generation-config") == 1
    assert flags[flags.index("--override-generation-config") + 1] == '{"temperature": 0.5}'


def test_a_model_is_served_under_its_name_and_its_aliases() -> None:
    model = ModelSettings(checkpoint="nano", aliases=("a", "org/b"))
    flags = build_arguments("nano", model, EngineSettings(), "/weights")
    at = flags.index("--served-model-name")
    assert flags[at + 1 :] == ["nano", "a", "org/b"], "the first is the one that answers carry"
    assert flags[flags.index("--model") + 1] == "/weights"


def test_the_engine_asks_for_the_key_of_the_stack() -> None:
    assert build({}, api_key=SecretStr("sesame"))[-1] == "--api-key=sesame"
    assert not any("api-key" in flag for flag in build({}))


def test_a_key_that_looks_like_an_option_is_still_a_key() -> None:
    assert build({}, api_key=SecretStr("-sesame"))[-1] == "--api-key=-sesame"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("max_model_len", None),
        ("max-model-len", None),
        ("max_modle_len", r"; did you mean max_model_len\?"),
        ("max-modle-len", r"; did you mean max_model_len\?"),
        ("zzz", ""),
    ],
)
def test_a_name_that_vllm_does_not_know_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, hint: str | None
) -> None:
    monkeypatch.setattr(
        "serving.plugin.interfaces.vllm_internals.known_server_args", lambda: frozenset({"max_model_len", "dtype"})
    )
    good = ModelSettings(checkpoint="x", engine_args={"dtype": "auto"})
    settings = Settings(models={"good": good, "m": ModelSettings(checkpoint="x", engine_args={name: 1})})
    if hint is None:
        check_engine_args(settings)
        return
    with pytest.raises(SettingsError, match=rf"^models\.m\.engine_args\.{name}: vLLM has no such argument{hint}$"):
        check_engine_args(settings)


def test_a_collector_of_traces_is_told_to_vllm() -> None:
    model = ModelSettings(checkpoint="nano")
    flags = build_arguments("nano", model, EngineSettings(), "/weights", "http://c:4318/v1/traces")
    assert flags[flags.index("--otlp-traces-endpoint") + 1] == "http://c:4318/v1/traces"
    assert "--otlp-traces-endpoint" not in build({})
