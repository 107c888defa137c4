"""On a device the guard's host side only launches: it copies without waiting and reads nothing back."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import pytest
import torch
from support.host_waits import DEVICE, HostWaits
from vllm import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext

from serving.plugin.repetition import ngram_guard
from serving.plugin.repetition.ngram_guard import DeviceGuard

IMAGE, SLOTS, VOCABULARY, MAX_LENGTH = 7, 6, 64, 256


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch) -> DeviceGuard:
    tokenizer = types.SimpleNamespace(get_vocab=lambda: {"<image>": IMAGE, "<td>": 5, "</td>": 6})
    monkeypatch.setattr(ngram_guard, "cached_tokenizer_from_config", lambda _: tokenizer)
    model_config = types.SimpleNamespace(max_model_len=MAX_LENGTH, architecture="DeepseekOCRForCausalLM")
    return DeviceGuard(types.SimpleNamespace(additional_config={}, model_config=model_config), device_state())


def device_state() -> Any:
    def buffer(*shape: int) -> Any:
        return types.SimpleNamespace(
            gpu=torch.empty(shape, dtype=torch.int32, device=DEVICE), np=np.full(shape, 40, np.int32)
        )

    return types.SimpleNamespace(
        device=DEVICE,
        max_num_reqs=SLOTS,
        all_token_ids=buffer(SLOTS, MAX_LENGTH),
        prompt_len=buffer(SLOTS),
        total_len=buffer(SLOTS),
    )


def context(rows: int) -> LogitsContext:
    def on_device() -> torch.Tensor:
        return torch.empty(rows, dtype=torch.int32, device=DEVICE)

    return LogitsContext(
        expanded_idx_mapping=on_device(),
        idx_mapping=on_device(),
        idx_mapping_np=np.arange(rows),
        expanded_local_pos=on_device(),
        input_ids=on_device(),
        pos=on_device(),
        seq_lens_upper_bound_np=np.full(rows, 200),
    )


def test_a_request_that_joins_costs_three_copies_and_no_wait(guard: DeviceGuard) -> None:
    guard.add_request(0, SamplingParams())
    guard.add_request(1, SamplingParams(extra_args={"ngram_size": 4, "whitelist_token_ids": [1, 2, 3]}))
    with HostWaits() as seen:
        guard.apply_staged_writes()
    assert seen.waits == []
    assert seen.num_copies == 3
    with HostWaits() as seen:
        guard.apply_staged_writes()
    assert (seen.waits, seen.num_copies, seen.num_launches) == ([], 0, 0), "nothing has joined"


def test_a_step_copies_nothing_and_waits_for_nothing(guard: DeviceGuard) -> None:
    for slot in range(SLOTS):
        guard.add_request(slot, SamplingParams())
    guard.apply_staged_writes()
    with HostWaits() as seen:
        guard.apply(torch.empty(SLOTS, VOCABULARY, device=DEVICE), context(SLOTS))
    assert seen.waits == []
    assert seen.num_copies == 0
    assert 0 < seen.num_launches < 100


def test_a_wait_would_be_seen() -> None:
    values = torch.empty(3, device=DEVICE)
    with HostWaits() as seen:
        torch.tensor([1.0, 2.0]).to(DEVICE)
        torch.tensor([1.0, 2.0], device=DEVICE)
        values.copy_(torch.ones(3))
        torch.ones(3).to(DEVICE, non_blocking=True)
    assert len(seen.waits) == 3
    assert seen.num_copies == 1
    with HostWaits(), pytest.raises((RuntimeError, NotImplementedError)):
        values.sum().item()
