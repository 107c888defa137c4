"""The table of model families against vLLM's own classes, and what routers make of it."""

from __future__ import annotations

import types
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.stock import import_stock
from serving.cluster.directory import ReplicaRecord, ReplicaState
from serving.plugin.modes.families import FAMILIES, UnknownFamilyError, find_family
from serving.plugin.modes.selection import ModeRules, ModeSelectionError
from serving.router.request.parsing import RoutedRequest
from serving.router.scheduling.work_estimate import read_images

INFOS = {
    "DeepseekOCRForCausalLM": ("deepseek_ocr", "DeepseekOCRProcessingInfo"),
    "DeepseekOCR2ForCausalLM": ("deepseek_ocr2", "DeepseekOCR2ProcessingInfo"),
    "UnlimitedOCRForCausalLM": ("unlimited_ocr", "UnlimitedOCRProcessingInfo"),
}
SIDES = st.integers(1, 6000)


@pytest.fixture(scope="module")
def count() -> Any:
    """vLLM's own counts: `count(architecture, width, height)`."""
    infos = {
        architecture: getattr(import_stock(f"vllm.model_executor.models.{module}"), name)
        for architecture, (module, name) in INFOS.items()
    }

    def ask(architecture: str, width: int, height: int, **more: Any) -> int:
        info = infos[architecture]
        return int(info.get_num_image_tokens(types.SimpleNamespace(), image_width=width, image_height=height, **more))

    return ask


def rules_of(architecture: str, settings: dict[str, Any] | None = None) -> ModeRules:
    return ModeRules.from_config(FAMILIES[architecture].rules_config(settings or {}))


@pytest.mark.parametrize("architecture", FAMILIES)
@given(width=SIDES, height=SIDES)
def test_a_page_counts_as_in_vllm(count: Any, architecture: str, width: int, height: int) -> None:
    (chosen,) = rules_of(architecture).choose({}, {}, [(width, height)])
    assert chosen.name == "gundam"
    assert chosen.mode.num_tokens(width, height) == count(architecture, width, height)


def test_published_counts() -> None:
    second, unlimited = (rules_of(name).own for name in ("DeepseekOCR2ForCausalLM", "UnlimitedOCRForCausalLM"))
    assert second.num_tokens(700, 700) == 256 + 1
    assert second.num_tokens(1654, 2339) == 6 * 144 + 256 + 1
    assert unlimited.num_tokens(2560, 5120) == 8 * 10 * (4 * 10 + 1) + 273


def test_pages_of_unlimited_ocr_are_tiled_only_one_by_one(count: Any) -> None:
    rules = rules_of("UnlimitedOCRForCausalLM")
    pages = [(1654, 2339), (640, 4000)]
    chosen = rules.choose({}, {}, pages)
    assert [choice.name for choice in chosen] == ["base", "base"]
    counts = [choice.mode.num_tokens(*page) for choice, page in zip(chosen, pages, strict=True)]
    assert counts == [count("UnlimitedOCRForCausalLM", *page, cropping=False) for page in pages] == [273, 273]


@pytest.mark.parametrize("architecture", ["DeepseekOCR2ForCausalLM", "UnlimitedOCRForCausalLM"])
@pytest.mark.parametrize("options", [{"mode": "tiny"}, {"max_tiles": 4}])
def test_a_mode_of_vllms_own_code_cannot_be_chosen(architecture: str, options: dict[str, Any]) -> None:
    with pytest.raises(ModeSelectionError, match="one mode, which cannot be chosen"):
        rules_of(architecture).choose(options, {}, [(10, 10)])


def test_a_checkpoints_own_settings_count_where_the_plugin_reads_pages() -> None:
    settings = {"base_size": 512, "image_size": 512, "crop_mode": False}
    assert rules_of("DeepseekOCRForCausalLM", settings).own.num_tokens(10, 10) == 73
    assert rules_of("UnlimitedOCRForCausalLM", settings).own.num_tokens(10, 10) == 273


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_router_counts_by_what_an_engine_of_the_family_reports(count: Any, architecture: str) -> None:
    reported = rules_of(architecture).as_config()
    record = ReplicaRecord("a", "m", "http://a", ReplicaState.READY, image_config=reported)
    request = RoutedRequest("/v1/chat/completions", "m", b"", True, True, image_sizes=((1654, 2339),))
    reading = read_images(request, record)
    assert (reading.modes, reading.num_tokens) == (("gundam",), count(architecture, 1654, 2339))


@pytest.mark.parametrize("architectures", [None, [], ["LlamaForCausalLM"], ["PaddleOCRVLForConditionalGeneration"]])
def test_another_family_is_refused_in_a_sentence(architectures: list[str] | None) -> None:
    with pytest.raises(UnknownFamilyError, match=r"and pages can be read with DeepSeek-OCR \(Deep.* only$"):
        find_family(architectures)


def test_each_family_is_one_that_vllm_has() -> None:
    from vllm import ModelRegistry

    assert {*FAMILIES} <= {*ModelRegistry.get_supported_archs()}
