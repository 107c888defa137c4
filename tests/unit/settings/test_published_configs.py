"""The files that run the published checkpoint: closed, and fitting the machine."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest
from support.paths import ROOT

from serving.settings.base import is_loopback
from serving.settings.stack import Settings, fill_keys, load_settings

FILES = [ROOT / "configs" / name for name in ("h100.yaml", "h100-two-engines.yaml", "published-cpu.yaml")]
ON_GPUS = FILES[:2]
PRODUCTION = ROOT / "k8s" / "overlays" / "gpu-prod" / "settings.yaml"
SECRETS = {
    "SERVING__ENGINE__API_KEY": "a-key",
    "SERVING__OCR__SECRET": "a-secret",
    "SERVING__BILLING__DATABASE_URL": "postgresql://serving:word@database/serving",
}
GPUS, GPU_BYTES = 8, 80 * 10**9
WEIGHT_BYTES, REST_BYTES = 6.7e9, 5e9
"""Of weights; of activations, CUDA graphs and the CUDA context."""
KV_BYTES_PER_TOKEN = 2 * 12 * 1280 * 2
"""Keys and values of 12 layers, 1,280 wide, in bfloat16."""
PAGE_TOKENS = 2000
"""A gundam page with its answer."""


def load(file: Path) -> Settings:
    return load_settings(file, SECRETS if file == PRODUCTION else {})


@pytest.mark.parametrize("file", [*FILES, PRODUCTION], ids=lambda file: f"{file.parent.name}/{file.name}")
def test_no_engine_is_open_to_a_network(file: Path) -> None:
    settings, _ = fill_keys(load(file))
    assert is_loopback(settings.engine.host) or settings.engine.api_key is not None
    assert is_loopback(settings.router.host) or settings.router.keys_file is not None
    assert not settings.engine.allow_unauthenticated
    assert not settings.router.allow_unauthenticated
    assert not settings.ocr.allow_unauthenticated


@pytest.mark.parametrize("file", [*FILES, PRODUCTION], ids=lambda file: f"{file.parent.name}/{file.name}")
def test_documents_can_be_read_and_the_commit_is_fixed(file: Path) -> None:
    settings = load(file)
    assert settings.ocr.enabled
    assert settings.ocr.playground
    (model,) = settings.models.values()
    assert len(model.engine_args["revision"]) == 40


@pytest.mark.parametrize("file", [*ON_GPUS, PRODUCTION], ids=lambda file: f"{file.parent.name}/{file.name}")
def test_memory_holds_as_many_pages_as_an_engine_takes(file: Path) -> None:
    (model,) = load(file).models.values()
    arguments, engines = model.engine_args, round(1 / model.gpus_per_replica)
    share = GPU_BYTES / engines
    cache = arguments.get("kv_cache_memory_bytes")
    if cache is None:
        assert engines == 1, "two engines that start at once measure each other's memory"
        cache = share * arguments["gpu_memory_utilization"] - WEIGHT_BYTES - REST_BYTES
    assert KV_BYTES_PER_TOKEN == 61_440
    assert cache + WEIGHT_BYTES + REST_BYTES <= share * 0.95
    # On average a page is half written.
    assert cache / KV_BYTES_PER_TOKEN >= arguments["max_num_seqs"] * (903 + PAGE_TOKENS) / 2
    assert arguments["max_num_batched_tokens"] >= arguments["max_model_len"]


@pytest.mark.parametrize("file", ON_GPUS, ids=lambda file: file.name)
def test_eight_gpus_and_their_routers_are_used_in_full(file: Path) -> None:
    settings = load(file)
    (model,) = settings.models.values()
    assert model.num_replicas * Decimal(str(model.gpus_per_replica)) == GPUS
    chunks_per_s = GPUS * 5000 / model.engine_args["stream_interval"]
    cores = chunks_per_s * 100e-6 + GPUS * 5 * 3e-3
    assert 4 <= settings.router.num_replicas <= 8
    assert cores / (settings.router.num_replicas - 1) < 0.6, "with one router lost"


def test_patience_is_as_long_as_a_page_on_a_processor() -> None:
    settings = load(FILES[2])
    assert settings.ocr.read.page_timeout_s <= settings.router.admission.request_timeout_s
    assert settings.router.read_timeout_s <= settings.router.admission.request_timeout_s
    assert settings.ocr.read.silence_timeout_s < settings.ocr.read.page_timeout_s
    (model,) = settings.models.values()
    assert model.gpus_per_replica == 0
