"""The command `python -m serving.engine.scripted`: one scripted engine on its own port."""

from __future__ import annotations

import asyncio
import signal
from typing import Annotated

import typer
import uvloop

from serving.engine.scripted.app import run_scripted
from serving.http.server import HttpServer
from serving.settings.stack import ScriptSettings

_DEFAULT = ScriptSettings()


def run(
    port: Annotated[int, typer.Option(help="0 takes a free one, which is printed.")] = 0,
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    name: Annotated[list[str] | None, typer.Option(help="Of the model; may be given again for aliases.")] = None,
    tokens_per_s: Annotated[float | None, typer.Option(help="Of one sequence; without it as fast as it goes.")] = None,
    prefill_tokens_per_s: Annotated[float | None, typer.Option()] = None,
    output_tokens: Annotated[int, typer.Option()] = _DEFAULT.output_tokens,
    max_num_seqs: Annotated[int, typer.Option()] = _DEFAULT.max_num_seqs,
    max_model_len: Annotated[int, typer.Option()] = _DEFAULT.max_model_len,
    start_s: Annotated[float, typer.Option()] = _DEFAULT.start_s,
    failure: Annotated[list[str] | None, typer.Option(help="What goes wrong; see scripted_failures.py.")] = None,
) -> None:
    """Serve a scripted engine until SIGTERM or Ctrl-C."""
    script = ScriptSettings(
        tokens_per_s=tokens_per_s,
        prefill_tokens_per_s=prefill_tokens_per_s,
        output_tokens=output_tokens,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        start_s=start_s,
        failures=tuple(failure or ()),
    )
    uvloop.run(_serve(script, name or ["nano"], host, port))


async def _serve(script: ScriptSettings, names: list[str], host: str, port: int) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with run_scripted(script, names) as (_, app):
        server = HttpServer(app, host=host, port=port, drain_s=1, has_lifespan=True)
        await server.start()
        print(f"listening on http://{host}:{server.port}", flush=True)
        await stop.wait()
        await server.stop()


def main() -> None:
    typer.run(run)


if __name__ == "__main__":
    main()
