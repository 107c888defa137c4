from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.paths import ROOT

from serving.errors import SettingsError
from serving.settings import stack as settings_module
from serving.settings.base import is_loopback
from serving.settings.stack import NANO, Settings, dump_settings, fill_keys, keep_keys, load_settings

CONFIGS = ROOT / "configs"
WriteSettings = Callable[..., Path]


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("2001:db8::1", False),
        ("example.com", False),
        ("localhost.example.com", False),
        ("", False),
    ],
)
def test_loopback_is_what_only_this_machine_reaches(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


# Files that come with the project


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.name)
def test_a_shipped_file_is_accepted_and_answers_to_the_published_name(file: Path) -> None:
    settings = load_settings(file)
    assert settings.find_model("deepseek-ai/DeepSeek-OCR") == next(iter(settings.models))


def test_the_local_file_runs_nano_on_loopback_at_the_hosted_price() -> None:
    settings = load_settings(CONFIGS / "local.yaml")
    assert list(settings.models) == ["nano"]
    assert settings.models["nano"].checkpoint == NANO
    assert settings.models["nano"].engine_args["dtype"] == "float32"
    assert settings.models["nano"].price.input_per_million == Decimal("0.03")
    assert settings.models["nano"].price.output_per_million == Decimal("0.10")
    assert (settings.router.host, settings.router.port) == ("127.0.0.1", 8000)
    assert not settings.router.remote_images.enabled


def test_the_gpu_file_runs_several_replicas_of_the_published_checkpoint() -> None:
    model = load_settings(CONFIGS / "h100.yaml").models["deepseek-ocr"]
    assert model.checkpoint == "deepseek-ai/DeepSeek-OCR"
    assert model.num_replicas > 1
    assert model.gpus_per_replica == 1
    assert model.engine_args["dtype"] == "bfloat16"
    assert model.engine_args["enable_prefix_caching"] is False
    assert model.engine_args["mm_processor_cache_gb"] == 0


# What is refused


@pytest.mark.parametrize(
    ("text", "key", "reason"),
    [
        ("rooter: {port: 1}", "rooter", "unknown key"),
        ("router: {prot: 1}", "router.prot", "unknown key"),
        ("router: {limits: {max_imgs: 1}}", "router.limits.max_imgs", "unknown key"),
        ("router: {port: many}", "router.port", "valid integer"),
        ("router: {port: 0}", "router.port", "greater than or equal to 1"),
        ("router: {port: 65536}", "router.port", "less than or equal to 65535"),
        ("router: {max_tries: 1.5}", "router.max_tries", "valid integer"),
        ("router: {max_tries: 0}", "router.max_tries", "greater than or equal to 1"),
        ("router: {read_timeout_s: 0}", "router.read_timeout_s", "greater than 0"),
        ("router: {limits: {max_body_bytes: 1}}", "router.limits.max_body_bytes", "greater than or equal to 1024"),
        ("router: {host: 0.0.0.0}", "router", "allow_unauthenticated"),
        ("router: {host: ''}", "router", "allow_unauthenticated"),
        ("router:", "router", "valid dictionary"),
        ("engine: {lease_s: 1.9, heartbeat_s: 1}", "engine", "lease_s must be at least twice heartbeat_s"),
        ("engine: {heartbeat_s: 0}", "engine.heartbeat_s", "greater than 0"),
        ("engine: {drain_s: .nan}", "engine.drain_s", "finite number"),
        ("log: {level: loud}", "log.level", "'debug', 'info', 'warning' or 'error'"),
        ("ray: {object_store_bytes: 1}", "ray.object_store_bytes", "greater than or equal to"),
        ("ray: {namespace: 'a b'}", "ray.namespace", "match pattern"),
    ],
)
def test_a_refusal_names_file_key_and_reason(write_settings: WriteSettings, text: str, key: str, reason: str) -> None:
    file = write_settings(text)
    with pytest.raises(SettingsError) as caught:
        load_settings(file)
    assert caught.value.message.startswith(f"{file}: {key}: ")
    assert reason in caught.value.message


@pytest.mark.parametrize(
    ("model", "key", "reason"),
    [
        ("{}", "checkpoint", "required"),
        ("{checkpoint: x, num_replicas: 0}", "num_replicas", "greater than or equal to 1"),
        ("{checkpoint: x, gpus_per_replica: -1}", "gpus_per_replica", "greater than or equal to 0"),
        ("{checkpoint: x, aliases: ['a b']}", "aliases.0", "match pattern"),
        ("{checkpoint: x, env: {OMP_NUM_THREADS: 1}}", "env.OMP_NUM_THREADS", "valid string"),
        ("{checkpoint: x, price: {input_per_million: '-1'}}", "price.input_per_million", "greater than or equal to 0"),
        ("{checkpoint: x, price: {input_per_million: '0.0000001'}}", "price.input_per_million", "6 decimal places"),
        ("{checkpoint: x, price: {output_per_million: 10001}}", "price.output_per_million", "less than or equal to"),
    ],
)
def test_a_model_that_cannot_be_run_is_refused(
    write_settings: WriteSettings, model: str, key: str, reason: str
) -> None:
    file = write_settings(f"models: {{m: {model}}}", is_whole=True)
    with pytest.raises(SettingsError) as caught:
        load_settings(file)
    assert caught.value.message.startswith(f"{file}: models.m.{key}: ")
    assert reason in caught.value.message


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("gpus_per_replica: 1.5", "gpus_per_replica 1.5 must be a whole number"),
        ("gpus_per_replica: 0.5", "gpu_memory_utilization must be at most 0.5"),
        ("gpus_per_replica: 0.25, engine_args: {gpu-memory-utilization: 0.3}", "must be at most 0.25"),
        ("gpus_per_replica: 0.25, engine_args: {gpu_memory_utilization: lots}", "must be at most 0.25"),
    ],
)
def test_engines_that_share_a_gpu_share_its_memory(write_settings: WriteSettings, model: str, reason: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(reason)):
        load_settings(write_settings(f"models: {{m: {{checkpoint: x, {model}}}}}", is_whole=True))


@pytest.mark.parametrize("argument", ["model", "served_model_name", "served-model-name", "host", "port", "api-key"])
def test_engine_args_may_not_set_what_the_stack_sets(write_settings: WriteSettings, argument: str) -> None:
    file = write_settings(f"models: {{m: {{checkpoint: x, engine_args: {{{argument}: y}}}}}}", is_whole=True)
    with pytest.raises(SettingsError, match=r"models\.m: engine_args may not set .*the stack sets them itself"):
        load_settings(file)


@pytest.mark.parametrize(
    "models",
    [
        pytest.param("{a: {checkpoint: x, aliases: [b]}, b: {checkpoint: y}}", id="an alias is another model"),
        pytest.param("{a: {checkpoint: x, aliases: [c]}, b: {checkpoint: y, aliases: [c]}}", id="two have one alias"),
        pytest.param("{a: {checkpoint: x, aliases: [a]}}", id="a model's own name"),
        pytest.param(
            "{a: {checkpoint: x, aliases: [c, c]}}",
            id="twice in one list",
        ),
    ],
)
def test_a_name_may_be_given_once(write_settings: WriteSettings, models: str) -> None:
    with pytest.raises(SettingsError, match="is given twice"):
        load_settings(write_settings(f"models: {models}", is_whole=True))


@pytest.mark.parametrize("models", ["{}", "{'a b': {checkpoint: x}}", "{-a: {checkpoint: x}}", "{1: {checkpoint: x}}"])
def test_models_need_a_name_that_a_request_can_use(write_settings: WriteSettings, models: str) -> None:
    with pytest.raises(SettingsError, match="models"):
        load_settings(write_settings(f"models: {models}", is_whole=True))


@pytest.mark.parametrize("text", ["", "[]", "nano", "3"])
def test_a_file_without_a_mapping_is_refused(write_settings: WriteSettings, text: str) -> None:
    sections = "models, engine, router, billing, ocr, ray, log, telemetry"
    with pytest.raises(SettingsError, match=f"must hold a mapping with the keys {sections}"):
        load_settings(write_settings(text, is_whole=True))


@pytest.mark.parametrize(
    "text",
    [
        "models: [",
        "\x00",
        "models: !!python/object/apply:os.getcwd []",
        pytest.param(
            "models: {m: {checkpoint: 2024-13-45}}",
        ),
    ],
)
def test_a_file_that_is_not_plain_yaml_is_refused(write_settings: WriteSettings, text: str) -> None:
    file = write_settings(text, is_whole=True)
    with pytest.raises(SettingsError) as caught:
        load_settings(file)
    assert caught.value.message.startswith(f"{file}: is not YAML: ")


def test_bytes_that_are_not_text_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_bytes(b"models: \xff")
    with pytest.raises(SettingsError, match="is not YAML"):
        load_settings(file)


@pytest.mark.parametrize("text", ["router: {port: 1, port: 2}", "router: {port: 1}\nrouter: {port: 2}", "models: {}"])
def test_a_key_that_stands_twice_is_refused(write_settings: WriteSettings, text: str) -> None:
    with pytest.raises(SettingsError, match="stands twice"):
        load_settings(write_settings(text))


@pytest.mark.parametrize("is_directory", [True, False])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, is_directory: bool) -> None:
    file = tmp_path if is_directory else tmp_path / "missing.yaml"
    with pytest.raises(SettingsError, match="cannot be read") as caught:
        load_settings(file)
    assert str(file) in caught.value.message


def test_everything_that_is_wrong_is_told_at_once(write_settings: WriteSettings) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(write_settings("router: {port: 0, prot: 1}\nlog: {level: loud}"))
    assert len(caught.value.message.splitlines()) == 3


def test_a_key_that_is_no_text_is_refused(write_settings: WriteSettings) -> None:
    with pytest.raises(SettingsError):
        load_settings(write_settings("1: 2"))


def test_a_yes_is_not_a_number(write_settings: WriteSettings) -> None:
    with pytest.raises(SettingsError):
        load_settings(write_settings("router: {num_replicas: yes}"))


@pytest.mark.parametrize("text", ["engine: {drain_s: .inf}", "router: {cpus_per_replica: .inf}"])
def test_infinity_is_refused(write_settings: WriteSettings, text: str) -> None:
    with pytest.raises(SettingsError):
        load_settings(write_settings(text))


# The environment


def load_with(monkeypatch: pytest.MonkeyPatch, file: Path, variables: dict[str, str]) -> Settings:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return load_settings(file)


@pytest.mark.parametrize(
    ("variable", "value", "read", "expected"),
    [
        ("SERVING__ROUTER__PORT", "9000", lambda s: s.router.port, 9000),
        ("SERVING__ROUTER__LIMITS__MAX_IMAGES", "3", lambda s: s.router.limits.max_images, 3),
        ("SERVING__ROUTER", '{"port": 9001}', lambda s: s.router.port, 9001),
        ("SERVING__LOG__LEVEL", "debug", lambda s: s.log.level, "debug"),
        ("SERVING__ENGINE__API_KEY", "k", lambda s: s.engine.api_key.get_secret_value(), "k"),
        ("SERVING__MODELS__NANO__NUM_REPLICAS", "2", lambda s: s.models["nano"].num_replicas, 2),
        ("SERVING__MODELS__NANO__ALIASES", '["b"]', lambda s: s.models["nano"].aliases, ("b",)),
        (
            "SERVING__MODELS__NANO__PRICE__INPUT_PER_MILLION",
            "0.5",
            lambda s: s.models["nano"].price.input_per_million,
            Decimal("0.5"),
        ),
    ],
)
def test_a_variable_goes_before_the_file_and_leaves_the_rest(
    monkeypatch: pytest.MonkeyPatch,
    write_settings: WriteSettings,
    variable: str,
    value: str,
    read: Callable[[Settings], Any],
    expected: Any,
) -> None:
    file = write_settings("router: {port: 8001, max_tries: 7}")
    before = load_settings(file)
    assert read_or_none(read, before) != expected
    settings = load_with(monkeypatch, file, {variable: value})
    assert read(settings) == expected
    assert settings.router.max_tries == 7
    assert settings.models["nano"].checkpoint == NANO


def read_or_none(read: Callable[[Settings], Any], settings: Settings) -> Any:
    try:
        return read(settings)
    except AttributeError:
        return None


@pytest.mark.parametrize(
    ("variable", "value", "key"),
    [
        ("SERVING__ROUTER__PORT", "many", "router.port: "),
        ("SERVING__ROUTER__PROT", "1", "router.prot: unknown key"),
        ("SERVING__MODELS__NANO__NUM_REPLICAS", "none", "models.nano.num_replicas: "),
        ("SERVING__ROOTER__PORT", "1", "unknown section 'rooter'"),
        ("SERVING__", "1", "unknown section ''"),
        pytest.param(
            "SERVING__ROUTER__HOST",
            "0.0.0.0",
            "router: host 0.0.0.0",
        ),
        pytest.param(
            "serving__rooter__port",
            "1",
            "unknown section 'rooter'",
        ),
        pytest.param(
            "SERVING__ROUTER",
            "port: 1",
            "router",
        ),
        pytest.param(
            "SERVING__MODELS__NANO__ALIASES",
            "b",
            "models",
        ),
    ],
)
def test_a_refusal_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, write_settings: WriteSettings, variable: str, value: str, key: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        load_with(monkeypatch, write_settings(), {variable: value})
    assert caught.value.message.startswith(f"environment {variable}: {key}")


def test_other_variables_are_none_of_our_business(
    monkeypatch: pytest.MonkeyPatch, write_settings: WriteSettings
) -> None:
    assert load_with(monkeypatch, write_settings(), {"SERVINGS__X": "1", "ROUTER__PORT": "2"}).router.port == 8000


def test_the_environment_that_is_passed_in_is_the_one_that_counts(
    monkeypatch: pytest.MonkeyPatch, write_settings: WriteSettings
) -> None:
    monkeypatch.setenv("SERVING__ROUTER__PORT", "9000")
    assert load_settings(write_settings(), environ={"SERVING__ROUTER__PORT": "9001"}).router.port == 9001


def test_a_replica_variable_keeps_its_letters(monkeypatch: pytest.MonkeyPatch, write_settings: WriteSettings) -> None:
    settings = load_with(monkeypatch, write_settings(), {"SERVING__MODELS__NANO__ENV__OMP_NUM_THREADS": "2"})
    assert settings.models["nano"].env == {"OMP_NUM_THREADS": "2"}


def test_an_engine_argument_from_the_environment_has_its_type(
    monkeypatch: pytest.MonkeyPatch, write_settings: WriteSettings
) -> None:
    settings = load_with(monkeypatch, write_settings(), {"SERVING__MODELS__NANO__ENGINE_ARGS__ENFORCE_EAGER": "false"})
    assert settings.models["nano"].engine_args == {"enforce_eager": False}


# What is in effect


def test_a_model_is_found_by_its_name_and_by_its_aliases() -> None:
    models: Any = {"a": {"checkpoint": "x", "aliases": ["b", "org/b"]}, "c": {"checkpoint": "y"}}
    settings = Settings(models=models)
    names = ("a", "b", "org/b", "c", "d", "", "A")
    assert [settings.find_model(name) for name in names] == ["a", "a", "a", "c", None, None, None]


def test_settings_cannot_be_changed(write_settings: WriteSettings) -> None:
    settings = load_settings(write_settings())
    for frozen in (settings, settings.router, settings.router.limits, settings.models["nano"]):
        with pytest.raises(ValueError, match="frozen"):
            setattr(frozen, next(iter(type(frozen).model_fields)), None)


def test_a_dump_masks_the_key_and_shows_the_rest(write_settings: WriteSettings) -> None:
    dumped = dump_settings(load_settings(write_settings("engine: {api_key: sesame}\nrouter: {port: 8001}")))
    assert "sesame" not in dumped
    assert yaml.safe_load(dumped)["engine"]["api_key"] == "**********"
    assert yaml.safe_load(dumped)["router"]["port"] == 8001


def test_a_dump_masks_a_token_among_the_replica_variables(write_settings: WriteSettings) -> None:
    file = write_settings("models: {m: {checkpoint: x, env: {HF_TOKEN: hf_sesame}}}", is_whole=True)
    assert "hf_sesame" not in dump_settings(load_settings(file))


# YAML has its own mind about control characters and line separators.
TEXT = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), max_size=20)
# Hypothesis draws words of the modules that are loaded, "secret" among them; what is masked cannot be read back.
VARIABLES = TEXT.filter(lambda name: settings_module._SECRET_NAME.search(name) is None)
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._/:-]{0,12}", fullmatch=True)
PRICES = st.integers(0, 10**10).map(lambda micro: str(Decimal(micro).scaleb(-6)))
MODELS = st.fixed_dictionaries(
    {"checkpoint": TEXT},
    optional={
        "num_replicas": st.integers(1, 1000),
        "gpus_per_replica": st.integers(0, 8),
        "engine_args": st.dictionaries(
            st.sampled_from(["dtype", "max_model_len", "enforce_eager", "limit_mm_per_prompt"]),
            st.none() | st.booleans() | st.integers() | TEXT | st.dictionaries(TEXT, st.integers()),
        ),
        "env": st.dictionaries(VARIABLES, TEXT),
        "price": st.fixed_dictionaries({}, optional={"input_per_million": PRICES, "output_per_million": PRICES}),
    },
)
GIVEN = st.fixed_dictionaries(
    {"models": st.dictionaries(NAMES, MODELS, min_size=1, max_size=3)},
    optional={
        "router": st.fixed_dictionaries(
            {},
            optional={
                "port": st.integers(1, 65535),
                "read_timeout_s": st.floats(0.001, 1e6),
                "limits": st.fixed_dictionaries({}, optional={"max_images": st.integers(1, 10**6)}),
            },
        ),
        "log": st.fixed_dictionaries({}, optional={"level": st.sampled_from(["debug", "info", "warning", "error"])}),
    },
)


@given(GIVEN)
@hypothesis.settings(max_examples=50)
def test_what_is_dumped_is_read_back_the_same(tmp_path_factory: pytest.TempPathFactory, given: dict[str, Any]) -> None:
    file = tmp_path_factory.getbasetemp() / "round-trip.yaml"
    file.write_text(json.dumps(given, ensure_ascii=False))  # JSON is YAML, and this writer is not the one under test
    settings = load_settings(file)
    file.write_text(dump_settings(settings))
    assert load_settings(file) == settings
    for name, model in given["models"].items():
        assert settings.models[name].engine_args == model.get("engine_args", {})
        assert settings.models[name].env == model.get("env", {})


def test_loading_leaves_the_environment_alone(write_settings: WriteSettings) -> None:
    before = dict(os.environ)
    load_settings(write_settings())
    assert dict(os.environ) == before


# Keys that the settings do not name


def build(*, has_keys: bool = False, **engine: object) -> Settings:
    return Settings.model_validate(
        {
            "models": {"m": {"checkpoint": "x"}},
            "engine": engine,
            "router": {"keys_file": "keys.yaml"} if has_keys else {},
        }
    )


@pytest.mark.parametrize(
    ("settings", "made"),
    [
        (build(), set()),
        (build(has_keys=True), {"engine", "metrics"}),
        (build(host="auto"), {"engine"}),
        (build(host="10.0.0.1"), {"engine"}),
        (build(host="auto", has_keys=True), {"engine", "metrics"}),
        (build(host="auto", allow_unauthenticated=True), set()),
        (build(allow_unauthenticated=True, has_keys=True), {"metrics"}),
        (build(host="auto", api_key="mine", has_keys=True), {"metrics"}),
    ],
)
def test_engines_and_metrics_get_keys_where_others_could_reach_them(settings: Settings, made: set[str]) -> None:
    filled, keys = fill_keys(settings)
    assert set(keys) == made
    assert not filled.engine.needs_key
    for name, key in (("engine", filled.engine.api_key), ("metrics", filled.telemetry.metrics_key)):
        if name in made:
            assert key is not None
            assert key.get_secret_value() == keys[name]
            assert len(keys[name]) > 40
            assert keys[name] not in dump_settings(filled)
    assert fill_keys(filled) == (filled, {})
    assert not made or fill_keys(settings)[1] != keys


def test_a_running_stack_keeps_its_keys() -> None:
    before, _ = fill_keys(build(has_keys=True))
    after = keep_keys(before, build(has_keys=True))
    assert after.engine.api_key == before.engine.api_key
    assert after.telemetry.metrics_key == before.telemetry.metrics_key
    named = keep_keys(before, build(has_keys=True, api_key="mine"))
    assert named.engine.api_key != before.engine.api_key


@pytest.mark.parametrize(
    ("text", "opens"),
    [
        ("", False),
        ("metrics_host: auto", True),
        ("metrics_host: auto, metrics_key: k", False),
        ("metrics_key: k", False),
    ],
)
def test_metrics_are_open_only_where_the_settings_open_them(
    write_settings: Callable[..., Path], text: str, opens: bool
) -> None:
    settings = load_settings(write_settings(f"telemetry: {{{text}}}"), {})
    assert settings.telemetry.opens_metrics is opens


def test_metrics_have_an_address_that_prometheus_can_be_told(write_settings: Callable[..., Path]) -> None:
    with pytest.raises(SettingsError, match=r"0\.0\.0\.0 is no address"):
        load_settings(write_settings("telemetry: {metrics_host: 0.0.0.0}"), {})
