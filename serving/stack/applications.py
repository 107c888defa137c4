"""Builds the Serve applications that make up the stack.

`serving up` deploys them with `build_all`. Ray Serve's own config files, and so KubeRay's `serveConfigV2`, name the
builders `engine`, `entrance` and `documents`:

    applications:
      - {name: engine-nano, route_prefix: null, import_path: "serving.stack.applications:engine", args: {model: nano}}
      - {name: router, route_prefix: /, import_path: "serving.stack.applications:entrance", args: {}}
      - {name: ocr, route_prefix: null, import_path: "serving.stack.applications:documents", args: {}}

A builder reads the settings file, overridden by the environment, on the node where Ray Serve runs it. That may be any
node of the cluster, so the file and the secrets must be on every node. Serve replaces running replicas only when `args`
change, which is the purpose of `revision`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, ValidationError
from ray.serve import Application

from serving.cluster.directory_actor import reach_directory
from serving.engine.checkpoint import CHECKPOINTS_DIR, resolve_checkpoint
from serving.engine.replica import build_engine_app
from serving.errors import SettingsError
from serving.ocr.deployment import build_ocr_app
from serving.router.deployment import build_router_app
from serving.settings.base import Frozen, Name
from serving.settings.stack import Settings, load_settings
from serving.stack.run_file import OCR_APP, ROUTER_APP, engine_app
from serving.web.app import build_routes

SETTINGS_VARIABLE = "SERVING_SETTINGS_FILE"
CHECKPOINTS_VARIABLE = "SERVING_CHECKPOINTS_DIR"
_SETTINGS_FILE = Path("/etc/serving/settings.yaml")


class EntranceArgs(Frozen):
    """The `args` of an application in Ray Serve's config file."""

    settings: Path = Field(default_factory=lambda: Path(os.environ.get(SETTINGS_VARIABLE, _SETTINGS_FILE)))
    """Path of the settings file on every node; if empty, the node's variable `SERVING_SETTINGS_FILE` names it."""
    revision: str = ""
    """Any text. Changing it makes Serve read the settings again and replace running replicas."""


class EngineArgs(EntranceArgs):
    model: Name
    """The model, a key of `models` in the settings."""
    checkpoints: Path = Field(default_factory=lambda: Path(os.environ.get(CHECKPOINTS_VARIABLE, CHECKPOINTS_DIR)))
    """Folder on the replicas' nodes that the nano checkpoint is written to, if the model uses it."""


_Args = TypeVar("_Args", bound=EntranceArgs)


def entrance(args: dict[str, Any]) -> Application:
    """Build the routers. See `EntranceArgs`.

    Raises:
        SettingsError: the arguments or the settings are invalid.
    """
    return build_entrance(load_settings(_parse(EntranceArgs, args).settings))


def engine(args: dict[str, Any]) -> Application:
    """Build the engine replicas of one model. See `EngineArgs`.

    Raises:
        SettingsError: the arguments or the settings are invalid.
    """
    given = _parse(EngineArgs, args)
    settings = load_settings(given.settings)
    if given.model not in settings.models:
        known = ", ".join(settings.models)
        raise SettingsError(f"args.model: {given.settings} has no model {given.model!r}, but {known}")
    return build_engine(given.model, settings, given.checkpoints)


def documents(args: dict[str, Any]) -> Application:
    """Build the OCR service. See `EntranceArgs`.

    Raises:
        SettingsError: the arguments or the settings are invalid.
    """
    return build_documents(load_settings(_parse(EntranceArgs, args).settings))


def _parse(kind: type[_Args], args: dict[str, Any]) -> _Args:
    try:
        return kind.model_validate(args)
    except ValidationError as error:
        places = (f"args.{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors())
        raise SettingsError("\n".join(places)) from error


def build_all(settings: Settings, checkpoints: Path = CHECKPOINTS_DIR) -> dict[str, Application]:
    """Build all applications, by name.

    Raises:
        SettingsError: the folder of a checkpoint does not exist.
    """
    engines = {engine_app(name): build_engine(name, settings, checkpoints) for name in settings.models}
    ocr = {OCR_APP: build_documents(settings)} if settings.ocr.enabled else {}
    return {**engines, ROUTER_APP: build_entrance(settings), **ocr}


def build_entrance(settings: Settings) -> Application:
    """Build the routers. Ray must be running."""
    directory = reach_directory(settings.ray.namespace, settings.engine.lease_s)
    return build_router_app(settings, directory)


def build_documents(settings: Settings) -> Application:
    """Build the OCR services, with the playground if it is enabled. Ray must be running."""
    directory = reach_directory(settings.ray.namespace, settings.engine.lease_s)
    return build_ocr_app(settings, directory, build_routes if settings.ocr.playground else None)


def build_engine(name: str, settings: Settings, checkpoints: Path = CHECKPOINTS_DIR) -> Application:
    """Build the replicas of one model.

    Raises:
        SettingsError: the checkpoint's folder does not exist, or the engines would be open to the network.
    """
    if settings.engine.needs_key:
        raise SettingsError(
            f"engine.host {settings.engine.host} can be reached by others and engines require no key; set "
            "engine.api_key (environment SERVING__ENGINE__API_KEY on every node), or engine.allow_unauthenticated: "
            "true if the network is trusted"
        )
    return build_engine_app(name, settings, resolve_checkpoint(settings.models[name].checkpoint, checkpoints))
