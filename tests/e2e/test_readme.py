"""The README's commands give what it says, on the running stack."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from e2e.conftest import ROOT, Stack, free_port

README = (ROOT / "README.md").read_text()
GUIDES = README + (ROOT / "CONTRIBUTING.md").read_text()


def find_block(language: str, marker: str) -> str:
    """The one fenced block of a language that holds the marker."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    (found,) = (block for block in blocks if marker in block)
    return found


def run(command: list[str], stack: Stack | None = None) -> str:
    if stack is not None:
        command = [part.replace("http://127.0.0.1:8000", stack.url) for part in command]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_curl_command_answers_the_sample_page(stack: Stack) -> None:
    answer = json.loads(run(["bash", "-c", find_block("sh", "sample.png")], stack))
    assert answer["model"] == "nano"
    assert answer["usage"]["estimated_cost"] > 0
    assert answer["choices"][0]["message"]["content"] + "\n" == find_block("text", "")


def test_the_python_client_streams_the_sample_page(stack: Stack, tmp_path: Path) -> None:
    out = run([sys.executable, "-c", find_block("python", "openai.OpenAI")], stack)
    assert out.startswith(find_block("text", ""))
    assert re.search(r"\n\d+ tokens, \$0\.0000\d+\n$", out)


def test_the_ocr_client_reads_the_sample_page_twice(stack: Stack) -> None:
    out = run([sys.executable, "-c", find_block("python", "OcrClient")], stack)
    assert re.fullmatch(re.escape(find_block("text", "")) + r"1 tiny [\d.e-]+\n", out)


def test_a_book_is_read_by_the_command_and_by_curl(stack: Stack, tmp_path: Path) -> None:
    def run_here(marker: str) -> str:
        block = find_block("sh", marker).replace("--pages 50", "--pages 7")
        block = block.replace(".venv/bin", str(ROOT / ".venv/bin")).replace("http://127.0.0.1:8000", stack.url)
        given: dict[str, Any] = {"cwd": tmp_path, "env": {**os.environ, "SERVING_URL": stack.url}, "timeout": 240}
        done = subprocess.run(["bash", "-ec", block], capture_output=True, text=True, check=False, **given)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run_here("serving ocr book.pdf")
    truth = json.loads((tmp_path / "book.json").read_text())
    read = (tmp_path / "texts/book.pdf.md").read_text()
    assert sum(text.splitlines()[0] in read for text in truth) >= 5
    answer = json.loads(run_here("file=@book.pdf -F pages=1-3,7"))
    assert [page["number"] for page in answer["pages"]] == [1, 2, 3, 7]
    assert {page["mode"] for page in answer["pages"]} == {"tiny"}


@pytest.mark.slow  # compiles the decoder, as vLLM does when it is not told otherwise
def test_a_bare_vllm_server_reads_the_sample_page(tmp_path: Path) -> None:
    block = find_block("sh", "vllm.entrypoints").replace("checkpoints/nano", str(tmp_path / "nano"))
    build, serve = block.split("\n", 1)
    command = f"{build} --out {tmp_path / 'nano'}\nexec {serve.split('#')[0].strip()} --port {free_port()}"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    log = tmp_path / "log"
    with log.open("w") as out:
        server = subprocess.Popen(["bash", "-ec", command], cwd=ROOT, env=environment, stdout=out, stderr=out)
    try:
        url = f"http://127.0.0.1:{command.rsplit(' ', 1)[1]}"
        deadline = time.monotonic() + 400
        while server.poll() is None and time.monotonic() < deadline and not is_up(url):
            time.sleep(1)
        assert is_up(url), log.read_text()[-3000:]
        asked = find_block("sh", "sample.png").replace("http://127.0.0.1:8000", url)
        asked = asked.replace('{"model": "nano",', f'{{"model": "{tmp_path / "nano"}", "temperature": 0,')
        answer = json.loads(run(["bash", "-c", asked]))
        assert answer["choices"][0]["message"]["content"] + "\n" == find_block("text", "")
    finally:
        server.terminate()
        server.wait(60)


def is_up(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
        return True
    return False


def test_the_settings_command_prints_what_is_in_effect() -> None:
    out = run(["bash", "-c", find_block("sh", "check-config")])
    assert re.search(r"^  port: 9000$", out, re.MULTILINE)
    assert "output_per_million: '0.2'" in out


@pytest.mark.parametrize("verb", sorted(set(re.findall(r"(?:`|^)make ([a-z0-9-]+)", GUIDES, re.MULTILINE))))
def test_every_make_verb_exists(verb: str) -> None:
    assert re.search(rf"^{verb}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_guides_name_files_that_exist() -> None:
    for room in re.findall(r"`((?:serving|tests|requirements|configs|k8s)/[\w/.-]*)`", GUIDES):
        assert (ROOT / room).exists(), room
