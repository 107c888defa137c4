"""`python -m benchmarks.gpu`: the same harness against the published checkpoint on this machine's GPUs.

Two servers take turns on them: the stack (`serving up` with configs/h100.yaml), and a bare vLLM server with the plugin
and the engine arguments of one replica, on one GPU. Each is measured twice at rising concurrency: with A4 pages by our
own client (`pages_client`), and by `vllm bench serve` as vLLM publishes it. At the end users come to the stack at their
own pace (`load`). `--dry-run` checks the settings and every command without a GPU, and prints them; `--any-device` runs
the whole of it on whatever is here, with configs/local.yaml for one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.documents import RESULTS, Document, write_document
from benchmarks.fastpath.rows import Row
from benchmarks.machine import describe_run
from benchmarks.pages_client import run_client
from benchmarks.router.servers import free_port, run_server
from benchmarks.router.stack import BARE, STACK
from benchmarks.vllm_bench import parse
from serving.engine.arguments import build_arguments, check_engine_args
from serving.errors import SettingsError
from serving.settings.stack import NANO, ModelSettings, Settings, load_settings

app = typer.Typer(add_completion=False)

_ROOT = Path(__file__).resolve().parents[1]
_SERVER = "vllm.entrypoints.launchers.api_server.entry"
_PAGE_PIXELS = "{(2339, 1654, 1): 1.0}"
_NUM_TOKENS = 512
_READY_WITHIN_S = 1800.0
"""The weights may have to be downloaded first."""


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """Every command that a run consists of, but the pages client's own."""

    model: str
    checkpoint: str
    stack: list[str]
    bare: list[str]
    environment: dict[str, str]
    """Of the bare server; the stack gives it to its replicas itself."""


def build_plan(settings: Settings, config: Path, bare_port: int) -> Plan:
    """Pure: from settings to commands. The bare server has one replica's arguments, on one GPU."""
    name, model = next(iter(settings.models.items()))
    checkpoint = "checkpoints/nano" if model.checkpoint == NANO else model.checkpoint
    arguments = build_arguments(name, model, settings.engine, checkpoint)
    bare = [sys.executable, "-m", _SERVER, *arguments, "--host", "127.0.0.1", "--port", str(bare_port)]
    stack = [sys.executable, "-m", "serving.cli.main", "up", "--config", str(config)]
    return Plan(name, checkpoint, stack, bare, build_environment(model))


def build_environment(model: ModelSettings) -> dict[str, str]:
    """What a replica's processes get."""
    images = model.images.environment()
    return {"VLLM_MEDIA_CONNECTOR": "serving", "VLLM_NO_USAGE_STATS": "1", **images, **model.env}


def build_vllm_bench(plan: Plan, url: str, concurrency: int, num_prompts: int, folder: Path, name: str) -> list[str]:
    """`vllm bench serve` with A4-sized random images, by the chat API."""
    return [
        *("--backend", "openai-chat", "--endpoint", "/v1/chat/completions", "--base-url", url),
        *("--model", plan.model, "--tokenizer", plan.checkpoint, "--dataset-name", "random-mm"),
        *("--random-mm-base-items-per-request", "1", "--random-mm-limit-mm-per-prompt", '{"image": 1}'),
        *("--random-mm-bucket-config", _PAGE_PIXELS, "--random-input-len", "16"),
        *("--random-output-len", str(_NUM_TOKENS), "--ignore-eos", "--num-prompts", str(num_prompts)),
        *("--max-concurrency", str(concurrency), "--save-result", "--result-dir", str(folder)),
        *("--result-filename", f"{name}.json", "--percentile-metrics", "ttft,tpot,itl,e2el"),
    ]


def find_gpus() -> list[str]:
    """Names of the GPUs that the driver tells of; [] without one."""
    with contextlib.suppress(OSError):
        command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip().splitlines() if done.returncode == 0 else []
    return []


@app.command()
def main(
    config: Annotated[Path, typer.Option(help="Settings of the stack.")] = Path("configs/h100.yaml"),
    levels: Annotated[str, typer.Option(help="Requests at a time, several between commas.")] = "1,8,32,128,256",
    pages_per_level: Annotated[int, typer.Option(min=1, help="At most.")] = 2048,
    any_device: Annotated[
        bool, typer.Option("--any-device", help="Run even without a GPU: a test of this file.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Another place for the result.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and print it; needs no GPU.")] = False,
) -> None:
    """Measure the published checkpoint on GPUs: pages/s and latencies by concurrency, and vLLM's own benchmark beside.

    Needs a Ray cluster when the settings join one (`ray start --head`), and a key in the variable SERVING_API_KEY when
    they name a keys file. Writes benchmarks/results/gpu.json.
    """
    console = Console(width=160)
    try:
        settings = load_settings(config)
        check_engine_args(settings)
    except SettingsError as error:
        raise typer.BadParameter(f"{config}: {error}") from error
    ports = (settings.router.port, free_port())
    plan = build_plan(settings, config, ports[1])
    concurrency = [int(level) for level in levels.split(",")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parse(build_vllm_bench(plan, f"http://127.0.0.1:{ports[0]}", concurrency[-1], 8, folder, "stack"))
        if dry_run:
            describe(plan, concurrency, pages_per_level, ports, console)
            return
        gpus = find_gpus()
        if not gpus and not any_device:
            console.print("nvidia-smi knows no GPU here; --dry-run checks the settings and prints what would run")
            raise typer.Exit(1)
        about = describe_run(_ROOT, f"python -m benchmarks.gpu --config {config} --levels {levels}", "full")
        about["machine"]["gpus"] = gpus
        began_s = time.monotonic()
        result = measure(plan, concurrency, pages_per_level, ports, folder)
    if json_file is not None:
        json_file.write_text(json.dumps(result) + "\n")
    else:
        write_document(Document("gpu", {**about, "took_s": round(time.monotonic() - began_s, 1)}, result), RESULTS)
    console.print(json.dumps(result["rows"], indent=1))


@contextlib.contextmanager
def run_side(plan: Plan, name: str, ports: tuple[int, int]) -> Iterator[str]:
    """One of both servers, and its address. They take turns on the GPUs: both at once would halve each other."""
    if name == STACK:
        with run_server(plan.stack, ports[0], ready_path="/ready", ready_within_s=_READY_WITHIN_S) as server:
            yield server.url
    else:
        with run_server(plan.bare, ports[1], environment=plan.environment, ready_within_s=_READY_WITHIN_S) as server:
            yield server.url


def measure(plan: Plan, levels: list[int], num_pages: int, ports: tuple[int, int], folder: Path) -> dict[str, Any]:
    """Both sides: curves of the pages client, and vLLM's own results."""
    curves: dict[str, dict[str, Any]] = {}
    vllm: dict[str, dict[str, Any]] = {}
    length = {"max_tokens": _NUM_TOKENS, "ignore_eos": True}
    for name in (STACK, BARE):
        curves[name], vllm[name] = {}, {}
        with run_side(plan, name, ports) as url:
            run_client(url, plan.model, num_pages=8, concurrency=8, kind="a4", extra=length)
            for level in levels:
                number = max(level, min(num_pages, 16 * level))
                curves[name][str(level)] = run_client(
                    url, plan.model, num_pages=number, concurrency=level, kind="a4", extra=length
                )
                slug = f"{'stack' if name == STACK else 'bare'}-{level}"
                arguments = build_vllm_bench(plan, url, level, number, folder, slug)
                # vLLM's client takes its key from OpenAI's variable.
                key = {"OPENAI_API_KEY": os.environ.get("SERVING_API_KEY", "")}
                command = [str(Path(sys.executable).with_name("vllm")), "bench", "serve", *arguments]
                subprocess.run(command, check=True, env={**os.environ, **key})
                vllm[name][str(level)] = json.loads((folder / f"{slug}.json").read_text())
            if name == STACK:
                load = [sys.executable, "-m", "benchmarks.load", "--url", url, "--model", plan.model]
                subprocess.run([*load, "--json", str(folder / "load.json")], check=True)
    return {
        "rows": [dataclasses.asdict(row) for row in build_rows(curves)],
        "curves": curves,
        "vllm_bench_serve": vllm,
        "load": json.loads((folder / "load.json").read_text()),
    }


def build_rows(curves: dict[str, dict[str, Any]]) -> list[Row]:
    """The stack has every replica of its settings, the bare server one GPU: rates are per server, not per GPU."""
    return [
        Row.of_rates(f"A4 pages read, c={level}", seen["pages_per_s"], curves[BARE][level]["pages_per_s"], BARE, None,
                     "pages/s")
        for level, seen in curves[STACK].items()
    ]  # fmt: skip


def describe(plan: Plan, levels: list[int], num_pages: int, ports: tuple[int, int], console: Console) -> None:
    """Every command in the order in which it would run."""
    folder = Path("RESULTS")
    names = {STACK: (plan.stack, ports[0]), BARE: (plan.bare, ports[1])}
    for name, (command, port) in names.items():
        url = f"http://127.0.0.1:{port}"
        console.rule(name)
        if name == BARE:
            changed = {key: value for key, value in plan.environment.items() if os.environ.get(key) != value}
            words = [f"{key}={value}" for key, value in changed.items()]
            console.print(shlex.join(["env", *words]), markup=False, soft_wrap=True)
        console.print(shlex.join(command), markup=False, soft_wrap=True)
        for level in levels:
            number = max(level, min(num_pages, 16 * level))
            pages = ["python", "-m", "benchmarks.pages_client", url, "--model", plan.model, "--kind", "a4"]
            console.print(shlex.join([*pages, "--pages", str(number), "--concurrency", str(level)]), soft_wrap=True)
            bench = build_vllm_bench(plan, url, level, number, folder, str(level))
            console.print(shlex.join(["vllm", "bench", "serve", *bench]), markup=False, soft_wrap=True)
    console.print("settings, engine arguments and vLLM's own arguments are in order", style="green")


if __name__ == "__main__":
    app()
