"""The engine arguments of the files that run the published checkpoint are ones that the installed vLLM takes."""

from __future__ import annotations

import pytest
from support.paths import ROOT

from serving.engine.arguments import build_arguments, check_engine_args
from serving.plugin.interfaces.vllm_internals import parse_server_args
from serving.settings.stack import load_settings

SECRETS = {
    "SERVING__ENGINE__API_KEY": "a-key",
    "SERVING__OCR__SECRET": "a-secret",
    "SERVING__BILLING__DATABASE_URL": "postgresql://serving:word@database/serving",
}


@pytest.mark.parametrize(
    "file",
    [
        *("configs/h100.yaml", "configs/h100-two-engines.yaml", "configs/published-cpu.yaml"),
        "k8s/overlays/gpu-prod/settings.yaml",
    ],
)
def test_vllm_takes_the_arguments(file: str) -> None:
    settings = load_settings(ROOT / file, SECRETS if "gpu-prod" in file else {})
    check_engine_args(settings)
    (model,) = settings.models.values()
    parsed = parse_server_args(build_arguments("deepseek-ocr", model, settings.engine, model.checkpoint))
    assert parsed.max_num_seqs == model.engine_args["max_num_seqs"]
    assert parsed.revision == model.engine_args["revision"]
    assert parsed.stream_interval == model.engine_args.get("stream_interval", 1)
    assert parsed.kv_cache_memory_bytes == model.engine_args.get("kv_cache_memory_bytes")
