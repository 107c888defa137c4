"""Clients that others wrote, unchanged, against the real stack: vLLM's own benchmark, openai, LiteLLM, LangChain.

LiteLLM and LangChain live in an environment of their own, with the versions of `outside_requirements.txt`.
"""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest
from support.ocr_service import build_service_settings, reads, run_host
from support.papers import write_pdf
from support.router_stack import USAGE, Engine, Exchange, answers, build_settings, run_router, streams
from unit.router.dialects.test_clients import answer, whole_stream
from unit.router.relay.test_ocr_relay import follow, with_ocr

from benchmarks.load.arrivals import Shape, schedule
from e2e.conftest import ROOT, Stack
from serving.settings.router import RouterSettings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PAGE = ROOT / "serving/nano/sample.png"
REQUIREMENTS = Path(__file__).with_name("outside_requirements.txt")
SCRIPT = Path(__file__).with_name("outside_clients.py")
UV = [sys.executable, "-m", "uv"]


def run(command: list[str], timeout_s: float = 300) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def build_python(folder: Path, requirements: Path) -> Path:
    """An interpreter that has clients and nothing of ours."""
    run([*UV, "venv", "--quiet", "--python", sys.executable, str(folder)])
    python = folder / "bin" / "python"
    run([*UV, "pip", "install", "--quiet", "--python", str(python), "-r", str(requirements)])
    return python


@pytest.fixture(scope="module")
def their_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_python(tmp_path_factory.mktemp("outside") / "venv", REQUIREMENTS)


async def ask_with(*command: str) -> dict[str, Any]:
    """What a client prints that is given the address of a router with its default settings, whose engine always says
    the same."""

    async def script(exchange: Exchange) -> None:
        is_stream = json.loads(exchange.asked.body).get("stream")
        await (streams(*whole_stream()) if is_stream else answers(answer("Grüße")))(exchange)

    settings = build_settings(stream_usage=RouterSettings().stream_usage)
    async with Engine(script) as engine, run_router(engine.record, settings=settings) as router:
        url = f"http://127.0.0.1:{router.port}/v1"
        told = await asyncio.to_thread(run, [part.format(url=url) for part in command])
    seen: dict[str, Any] = json.loads(told.splitlines()[-1])
    return seen


@pytest.fixture(scope="module")
def truth(stack: Stack) -> str:
    """What the official client gets for the README's page."""
    page = base64.b64encode(PAGE.read_bytes()).decode()
    content: list[Any] = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{page}"}},
        {"type": "text", "text": "Free OCR."},
    ]
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="unused", timeout=120) as client:
        messages: list[Any] = [{"role": "user", "content": content}]
        whole = client.chat.completions.create(model="nano", messages=messages, temperature=0)
        pieces = client.chat.completions.create(model="nano", messages=messages, temperature=0, stream=True)
        text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
        assert text == whole.choices[0].message.content
        assert next(model.id for model in client.models.list()) == "nano"
    assert text == (ROOT / "serving/nano/sample.txt").read_text().rstrip("\n")
    return text


@pytest.mark.parametrize("name", ["litellm", "langchain"])
def test_a_client_reads_a_page_whole_and_as_a_stream(name: str, their_python: Path, stack: Stack, truth: str) -> None:
    seen = json.loads(run([str(their_python), str(SCRIPT), name, f"{stack.url}/v1", str(PAGE)]).splitlines()[-1])
    assert seen["whole"] == seen["stream"] == truth
    assert seen["num_pieces"] > 10, "it came piece by piece"
    assert seen["tokens"] > 10
    assert seen["error"] == "not found"
    assert seen.get("batch", [truth]) == [truth] * len(seen.get("batch", [truth]))
    assert seen.get("response", truth) == truth
    for more in ("tokens unasked", "tokens of the response"):
        assert seen.get(more, seen["tokens"]) == seen["tokens"], more


def test_openai_agents_uses_both_apis_and_counts_tokens(tmp_path: Path) -> None:
    python = build_python(tmp_path / "venv", Path(__file__).with_name("outside_agents_requirements.txt"))
    seen = asyncio.run(ask_with(str(python), str(Path(__file__).with_name("outside_agents.py")), "{url}"))
    assert seen == {"texts": ["Grüße"] * 4, "tokens": [USAGE["completion_tokens"]] * 4}


@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed (apt install npm)")
def test_vercels_ai_reads_a_page_by_the_responses_api(tmp_path: Path) -> None:
    folder = tmp_path / "vercel"
    shutil.copytree(Path(__file__).with_name("vercel"), folder)
    run(["npm", "ci", "--silent", "--no-audit", "--no-fund", "--prefix", str(folder)])
    page = "data:image/png;base64," + base64.b64encode(PAGE.read_bytes()).decode()
    seen = asyncio.run(ask_with("node", str(folder / "read.mjs"), "{url}", page))
    assert seen == {"texts": ["Grüße"] * 2, "tokens": [USAGE["completion_tokens"]] * 2}


def test_litellm_reads_a_document_by_its_adapter_for_mistral(their_python: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.pdf"
    write_pdf(file, 2, (100, 100))

    async def read() -> str:
        async with (
            Engine(reads(), max_num_seqs=16) as engine,
            run_router(engine.record, settings=with_ocr()) as router,
            run_host(build_service_settings(tmp_path), router.port) as (host, _),
        ):
            follow(router, host.record.url)
            command = [str(their_python), str(SCRIPT), "litellm ocr", f"http://127.0.0.1:{router.port}/v1", str(file)]
            return await asyncio.to_thread(run, command)

    seen = json.loads(asyncio.run(read()).splitlines()[-1])
    assert seen == {"pages": [[1, "Hello page"]], "usage": 1}


@pytest.mark.parametrize(
    ("backend", "endpoint", "dataset"),
    [
        ("openai-chat", "/v1/chat/completions", "random-mm"),
        ("openai-chat", "/v1/chat/completions", "random"),
        ("openai", "/v1/completions", "random"),
    ],
)
def test_vllm_bench_serve_completes_every_request(
    backend: str, endpoint: str, dataset: str, stack: Stack, tmp_path: Path
) -> None:
    num_prompts, num_tokens = 12, 32
    arguments = ["--backend", backend, "--endpoint", endpoint, "--base-url", stack.url, "--dataset-name", dataset]
    arguments += ["--model", "nano", "--tokenizer", str(ROOT / "checkpoints/nano"), "--num-prompts", str(num_prompts)]
    arguments += ["--random-input-len", "32", "--random-output-len", str(num_tokens), "--max-concurrency", "4"]
    arguments += ["--ignore-eos", "--save-result", "--result-dir", str(tmp_path), "--disable-tqdm"]
    if dataset == "random-mm":
        arguments += ["--random-mm-base-items-per-request", "1", "--random-mm-limit-mm-per-prompt", '{"image": 1}']
        arguments += ["--random-mm-bucket-config", "{(512, 512, 1): 1.0}"]
    run([str(Path(sys.executable).with_name("vllm")), "bench", "serve", *arguments])
    (file,) = tmp_path.glob("*.json")
    result = json.loads(file.read_text())
    assert result["completed"] == num_prompts, result.get("errors")
    assert result["total_output_tokens"] == num_prompts * num_tokens
    assert result["mean_ttft_ms"] > 0
    assert result["mean_itl_ms"] > 0


def test_locust_reads_pages_from_two_processes(stack: Stack, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.load", "--url", stack.url, "--seconds", "8", "--rate", "2"]
    run([*command, "--workers", "2", "--arrivals", "burst", "--out", str(tmp_path)])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["processes"] == 2
    whole = list(schedule(Shape.BURST, 2, 8, seed=1))
    assert summary["visits"] == len(whole), "the processes share one schedule"
    assert summary["errors"] == {}
    assert summary["pages"] > 3
    assert summary["dollars"] > 0
    assert summary["first_s"]["p50"] < summary["whole_s"]["p99"]
    assert "<html" in (tmp_path / "report.html").read_text().lower()
