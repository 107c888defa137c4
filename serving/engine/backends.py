"""Starts the engine of a replica: vLLM's `AsyncLLM`, or the scripted engine."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from serving.engine.arguments import build_arguments
from serving.engine.precision import choose_dtype
from serving.engine.scripted.app import ScriptedEngine, run_scripted
from serving.engine.serve_log import keep_serve_log
from serving.engine.token_counts import EngineUsage, SequenceCounts, UsageApp
from serving.errors import SettingsError
from serving.plugin.modes.families import UnknownFamilyError, find_family
from serving.plugin.modes.image_config import read_image_config
from serving.plugin.modes.selection import ModeRules
from serving.settings.stack import NANO, ScriptSettings, Settings
from serving.settings.telemetry import TelemetrySettings

Say = Callable[[str], None]
"""Reports progress, for people to read."""


@dataclass(frozen=True, slots=True)
class Engine:
    """A started engine."""

    client: Any
    """Reports its health: `errored`, `is_running`, `dead_error`."""
    app: UsageApp
    """Its HTTP API, an ASGI app."""
    facts: Mapping[str, Any]
    """Fields of the replica's record in the directory."""
    fail: Callable[[], None]
    """Called when the engine has died: closes the usage of running requests."""


@contextlib.asynccontextmanager
async def run_engine(name: str, settings: Settings, checkpoint: str, say: Say) -> AsyncIterator[Engine]:
    """Run the engine that the model's settings ask for. Leaving the context stops it and its processes.

    Raises:
        SettingsError: the engine arguments or the script are invalid.
    """
    model, key = settings.models[name], settings.engine.api_key
    api_key = None if key is None else key.get_secret_value()
    if model.script is not None:
        async with _run_scripted(model.script, (name, *model.aliases), api_key, settings.telemetry) as engine:
            yield engine
    else:
        async with _run_vllm(name, settings, checkpoint, api_key, say) as engine:
            yield engine


@contextlib.asynccontextmanager
async def _run_scripted(
    script: ScriptSettings, names: tuple[str, ...], api_key: str | None, telemetry: TelemetrySettings
) -> AsyncIterator[Engine]:
    async with run_scripted(script, names, api_key=api_key) as (engine, app):
        facts = {
            "max_num_seqs": engine.max_num_seqs,
            "capacity_tokens": engine.kv_tokens,
            "max_model_len": engine.max_model_len,
        }
        yield Engine(engine, UsageApp(app, ScriptedUsage(engine), api_key, telemetry), facts, fail=lambda: None)


class ScriptedUsage:
    """The usage of a scripted engine, which counts by itself."""

    def __init__(self, engine: ScriptedEngine) -> None:
        self._engine = engine

    def open(self, request_id: str) -> None:
        pass

    def close(self, request_id: str) -> None:
        pass

    def find(self, request_id: str) -> dict[str, Any] | None:
        usage = self._engine.find_usage(request_id)
        return None if usage is None else {**dataclasses.asdict(usage), "finish_reason": usage.finish_reason or ""}

    def totals(self) -> dict[str, int]:
        return self._engine.usage_totals()


@contextlib.asynccontextmanager
async def _run_vllm(
    name: str, settings: Settings, checkpoint: str, api_key: str | None, say: Say
) -> AsyncIterator[Engine]:
    model = settings.models[name]
    say("importing vLLM")
    if model.checkpoint == NANO:
        await asyncio.to_thread(_build_checkpoint, Path(checkpoint))
    vllm_internals = await asyncio.to_thread(_import_vllm)
    flags = build_arguments(name, model, settings.engine, checkpoint, settings.telemetry.traces_url)
    arguments = _parse(vllm_internals, flags)
    given = arguments.dtype
    arguments.dtype = choose_dtype(given, vllm_internals.is_built_for_cpus())
    await _check_family(vllm_internals, name, checkpoint, arguments.revision)
    if arguments.dtype != given:
        say(f"dtype auto: {arguments.dtype}, since this processor does not compute in bfloat16")
    with keep_serve_log():
        vllm_internals.configure_logging(arguments)
    say("starting the engine process and loading weights")
    vllm_internals.end_streams_with_usage()
    vllm_internals.write_text_chunks()
    async with vllm_internals.run_engine(arguments) as (client, app):
        vllm_internals.remember_environment()
        usage = EngineUsage()
        vllm_internals.watch_sequences(client, _Watcher(usage, vllm_internals.sequence_counts))
        config = client.vllm_config
        multimodal = config.model_config.multimodal_config
        facts = {
            "max_num_seqs": config.scheduler_config.max_num_seqs,
            "capacity_tokens": vllm_internals.kv_cache_tokens(config),
            "max_model_len": config.model_config.max_model_len,
            "image_config": _describe_images(config.model_config),
            "image_options": _scalars(multimodal.mm_processor_kwargs or {}),
        }
        yield Engine(
            client, UsageApp(app, usage, api_key, settings.telemetry), facts, fail=lambda: usage.end_all("error")
        )


async def _check_family(vllm_internals: ModuleType, name: str, checkpoint: str, revision: str | None) -> None:
    """Refuse a checkpoint whose pages would be counted by another family's rules.

    Raises:
        SettingsError: it is of no family that is known here.
    """
    architectures = await asyncio.to_thread(vllm_internals.read_architectures, checkpoint, revision)
    try:
        if architectures is not None:
            find_family(architectures)
    except UnknownFamilyError as error:
        raise SettingsError(f"models.{name}.checkpoint {checkpoint}: {error}") from error


class _Watcher:
    """Forwards events of sequences in vLLM's front end to the usage."""

    def __init__(self, usage: EngineUsage, read: Callable[[Any], tuple[int, int, int]]) -> None:
        self._usage = usage
        self._read = read

    def begin(self, sequence_id: str, engine_id: str, num_image_tokens: int, state: Any) -> None:
        def read() -> SequenceCounts:
            prompt, cached, completion = self._read(state)
            return SequenceCounts(prompt, num_image_tokens if prompt else 0, cached, completion)

        self._usage.begin(sequence_id, engine_id, read)

    def end(self, sequence_id: str, finish_reason: str) -> None:
        self._usage.end(sequence_id, finish_reason)


def _describe_images(model_config: Any) -> tuple[tuple[str, Any], ...] | None:
    """Return the engine's image settings with defaults resolved, or None for a model that reads images differently."""
    try:
        config = read_image_config(model_config)
        modes = (("modes", tuple(config["modes"])),) if "modes" in config else ()
        family = find_family(model_config.architectures)
        return ModeRules.from_config(family.rules_config(config)).as_config() + modes
    except (TypeError, ValueError):
        return None


def _scalars(config: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Return the plain values of a configuration, for a record that is compared and sent."""
    return tuple((key, value) for key, value in sorted(config.items()) if isinstance(value, bool | int | float | str))


def _build_checkpoint(folder: Path) -> None:
    from serving.nano.build import build_checkpoint

    build_checkpoint(folder)


def _import_vllm() -> ModuleType:
    """Import vLLM. It takes seconds, so it runs in a thread while the event loop continues."""
    import vllm  # noqa: F401

    from serving.plugin.interfaces import vllm_internals

    return vllm_internals


def _parse(vllm_internals: ModuleType, flags: list[str]) -> Any:
    """Parse the command line into vLLM's namespace.

    Raises:
        SettingsError: vLLM does not accept the `engine_args`.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return vllm_internals.parse_server_args(flags)
    except SystemExit:
        last = (complaint.getvalue().strip().splitlines() or ["no reason given"])[-1]
        raise SettingsError(f"engine_args: vLLM does not accept them: {last.partition('error: ')[2] or last}") from None
