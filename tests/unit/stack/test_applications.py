"""The builders of Serve applications, called as Ray Serve calls them; what they make is not deployed here."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serving.engine.checkpoint import resolve_checkpoint
from serving.errors import SettingsError
from serving.settings.stack import Settings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

    from serving.stack import applications
    from serving.stack.applications import EngineArgs, EntranceArgs


class Directory:
    """In the place of the actor's handle."""


@pytest.fixture(autouse=True)
def reached(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    calls: list[tuple[str, float]] = []

    def reach(namespace: str, lease_s: float) -> Directory:
        calls.append((namespace, lease_s))
        return Directory()

    monkeypatch.setattr(applications, "reach_directory", reach)
    return calls


def build(builder: Callable[[dict[str, Any]], Any], args: dict[str, Any]) -> Any:
    """The deployment behind what Serve makes of an import path and its args."""
    return call_user_app_builder_with_args_if_necessary(builder, args)._bound_deployment


def test_an_engine_is_built_from_the_mounted_file(write_settings: Callable[..., Path], tmp_path: Path) -> None:
    file = write_settings("models: {nano: {checkpoint: nano, num_replicas: 3}}", is_whole=True)
    deployment = build(
        applications.engine, {"settings": str(file), "model": "nano", "checkpoints": str(tmp_path), "revision": "7"}
    )
    assert (deployment.name, deployment.num_replicas) == ("engine-nano", 3)
    name, settings, checkpoint = deployment.init_args
    assert (name, checkpoint) == ("nano", str(tmp_path / "nano"))
    assert settings.models["nano"].num_replicas == 3


def test_the_environment_says_where_the_file_is_and_what_differs(
    write_settings: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SERVING_SETTINGS_FILE", str(write_settings()))
    monkeypatch.setenv("SERVING_CHECKPOINTS_DIR", str(tmp_path))
    monkeypatch.setenv("SERVING__MODELS__NANO__NUM_REPLICAS", "2")
    assert build(applications.engine, {"model": "nano"}).num_replicas == 2
    assert EngineArgs(model="nano").checkpoints == tmp_path
    monkeypatch.delenv("SERVING_SETTINGS_FILE")
    assert EntranceArgs().settings == Path("/etc/serving/settings.yaml")


def test_the_entrance_is_the_routers(write_settings: Callable[..., Path], reached: list[tuple[str, float]]) -> None:
    file = write_settings("router: {num_replicas: 2}\nray: {namespace: other}\nengine: {lease_s: 7}")
    deployment = build(applications.entrance, {"settings": str(file)})
    assert (deployment.name, deployment.num_replicas) == ("router", 2)
    assert reached == [("other", 7.0)]


def test_routers_behind_serve_need_its_haproxy(
    write_settings: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = {"settings": str(write_settings("router: {behind_serve: true}"))}
    monkeypatch.delenv("RAY_SERVE_ENABLE_HA_PROXY", raising=False)
    with pytest.raises(SettingsError, match=r"behind_serve needs RAY_SERVE_ENABLE_HA_PROXY=1"):
        build(applications.entrance, args)
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    assert build(applications.entrance, args).func_or_class.__name__ == "ServedRouterReplica"


@pytest.mark.parametrize(
    ("builder", "args", "reason"),
    [
        (applications.engine, {"model": "other"}, r"args\.model: .* has no model 'other', but nano"),
        (applications.engine, {}, r"args\.model: Field required"),
        (applications.engine, {"model": "nano", "setings": "x"}, r"args\.setings: Extra inputs"),
        (applications.entrance, {"model": "nano"}, r"args\.model: Extra inputs"),
        (applications.entrance, {"settings": "/missing.yaml"}, r"/missing\.yaml"),
    ],
)
def test_args_that_cannot_be_used_are_refused(
    write_settings: Callable[..., Path], builder: Any, args: dict[str, Any], reason: str
) -> None:
    with pytest.raises(SettingsError, match=reason):
        build(builder, {"settings": str(write_settings()), **args})


def test_replicas_ask_for_the_resources_of_their_nodes(write_settings: Callable[..., Path]) -> None:
    file = write_settings(
        "models: {nano: {checkpoint: nano, resources_per_replica: {engine: 1}}}\n"
        "router: {resources_per_replica: {router: 0.5}}",
        is_whole=True,
    )
    args = {"settings": str(file)}
    engine, router = build(applications.engine, {**args, "model": "nano"}), build(applications.entrance, args)
    assert (engine.ray_actor_options["resources"], router.ray_actor_options["resources"]) == (
        {"engine": 1.0},
        {"router": 0.5},
    )


def test_a_stack_is_an_application_for_each_model_and_the_entrance() -> None:
    settings = Settings.model_validate({"models": {"a": {"checkpoint": "nano"}, "b": {"checkpoint": "x/y"}}})
    assert list(applications.build_all(settings)) == ["engine-a", "engine-b", "router"]


# The checkpoint


def test_a_folder_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_checkpoint("weights") == str(tmp_path / "weights")
    assert resolve_checkpoint("./weights") == str(tmp_path / "weights")
    assert resolve_checkpoint(str(tmp_path / "weights")) == str(tmp_path / "weights")
    assert resolve_checkpoint("nano") == str(tmp_path / "checkpoints" / "nano")


def test_a_repository_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_checkpoint("deepseek-ai/DeepSeek-OCR") == "deepseek-ai/DeepSeek-OCR"


@pytest.mark.parametrize("checkpoint", ["./missing", "/missing/weights", "~/missing", "../missing"])
def test_a_folder_that_is_not_there_is_refused(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SettingsError, match="there is no such folder"):
        resolve_checkpoint(checkpoint)


def test_a_folder_in_the_home_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_checkpoint("~/weights") == str(tmp_path / "weights")
