import json
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import serving.nano.training.train as train_module
from serving.nano.config import NanoConfig
from serving.nano.pages import CORE, WIDE, sample_page
from serving.nano.tokenizer import EOS_ID, FIRST_BYTE_ID, decode_ids
from serving.nano.training.batches import IGNORED, Batch
from serving.nano.training.export import export_weights
from serving.nano.training.metrics import character_error_rate, edit_distance, mean_error_rate
from serving.nano.training.plan import CONTINUED, Clock, Plan, View, learning_rate, training_spec, view_of
from serving.nano.training.train import Rhythm, Trainer, run_training

SMALL = NanoConfig(
    image_size=128,
    sam_width=32,
    sam_layers=2,
    sam_heads=2,
    neck_channels=16,
    downsample_channels=(32, 64),
    clip_width=64,
    clip_layers=1,
    clip_heads=1,
    hidden_size=256,
    num_heads=4,
    dense_size=64,
    expert_size=16,
)
SMALL_PAGES: dict[str, Any] = {"size_px": 128, "num_lines": (1, 3)}
PLAN = Plan(
    batch_pages=2,
    encoder_until=0.3,
    average_decay=0.9,
    core=replace(CORE, **SMALL_PAGES),
    wide=replace(WIDE, **SMALL_PAGES),
    measured_chars=(1, 30),
)
RHYTHM = Rhythm(log_steps=1, measured_pages=2)
SECOND = replace(
    CONTINUED,
    batch_pages=2,
    heads_steps=2,
    core=PLAN.core,
    wide=PLAN.wide,
    measured_chars=PLAN.measured_chars,
    views=(View(256, 0.3, 1), View(384, 0.2, 1)),
)


def train(out: Path, max_steps: int, stop_after: int | None = None) -> dict[str, torch.Tensor]:
    clock = Clock(max_steps, 1e9)
    if stop_after is None:
        return run_training(out, PLAN, clock, RHYTHM, SMALL).state_dict()
    interrupt = threading.Thread(target=interrupt_at, args=(clock, stop_after))
    interrupt.start()
    model = run_training(out, PLAN, clock, RHYTHM, SMALL)
    interrupt.join()
    assert stop_after <= clock.step < max_steps
    return model.state_dict()


def interrupt_at(clock: Clock, step: int) -> None:
    while clock.step < step:
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    straight = train(tmp_path / "straight", 40)
    train(tmp_path / "stopped", 40, stop_after=5)
    resumed = train(tmp_path / "stopped", 40)
    assert straight.keys() == resumed.keys()
    for name, weight in straight.items():
        assert torch.equal(weight, resumed[name]), name


def test_a_run_logs_losses_and_error_rates(tmp_path: Path) -> None:
    train(tmp_path, 10)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, 11), 10]
    assert "text" not in lines[0]
    assert lines[-2]["text"] > 0
    assert lines[-1].keys() >= {"cer_core", "cer_wide"}


def test_a_second_stretch_starts_from_weights_alone(tmp_path: Path) -> None:
    train(tmp_path / "first", 10)
    weights = tmp_path / "weights.safetensors"
    export_weights(tmp_path / "first", weights, is_last=True)
    out = tmp_path / "second"
    run_training(out, SECOND, Clock(2, 1e9), RHYTHM, SMALL, weights)
    after_heads = torch.load(out / "training.pt", weights_only=True)["model"]
    for name, weight in load_file(weights).items():
        assert torch.equal(weight.float(), after_heads[name]), name
    moved = run_training(out, SECOND, Clock(14, 1e9), RHYTHM, SMALL, weights).state_dict()
    assert not torch.equal(moved["lm_head.weight"], after_heads["lm_head.weight"])
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert {line["view"] for line in lines if "view" in line} == {128, 256, 384}
    assert all("text" in line for line in lines if "view" in line and line["step"] > SECOND.heads_steps)
    assert lines[-1].keys() >= {"cer_core", "cer_wide", "cer_view"}


def test_a_running_mean_of_the_weights_is_kept_and_exported(tmp_path: Path) -> None:
    trainer = Trainer(replace(PLAN, encoder_until=0.0), Clock(100, 1e9), SMALL)
    batch = Batch.from_pages([sample_page(PLAN.core, "train", 0, index) for index in range(2)], SMALL)
    trainer.step(batch)
    wanted = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    for _ in range(3):
        trainer.step(batch)
        wanted = {name: 0.9 * wanted[name] + 0.1 * weight for name, weight in trainer.model.state_dict().items()}
    assert trainer.reader is not trainer.model
    for name, weight in trainer.reader.state_dict().items():
        assert torch.allclose(weight, wanted[name], atol=1e-6), name
    torch.save(trainer.state(), tmp_path / "training.pt")
    mean, last = tmp_path / "mean.safetensors", tmp_path / "last.safetensors"
    export_weights(tmp_path, mean)
    export_weights(tmp_path, last, is_last=True)
    assert torch.equal(load_file(mean)["lm_head.weight"], trainer.reader.lm_head.weight.half())
    assert torch.equal(load_file(last)["lm_head.weight"], trainer.model.lm_head.weight.half())


@pytest.mark.parametrize(("flags", "is_quick"), [({"avx2", "avx512f"}, False), ({"avx2", "amx_bf16"}, True)])
def test_bfloat16_is_used_where_the_processor_has_it(
    monkeypatch: pytest.MonkeyPatch, flags: set[str], is_quick: bool
) -> None:
    monkeypatch.setattr(train_module, "_processor_flags", lambda: flags)
    with train_module._quickest_precision():
        assert torch.is_autocast_enabled("cpu") == is_quick


def test_exported_weights_can_be_the_mean_with_others(tmp_path: Path) -> None:
    train(tmp_path / "run", 2)
    files = [tmp_path / f"{name}.safetensors" for name in ("start", "run", "mean")]
    export_weights(tmp_path / "run", files[1])
    save_file({name: torch.zeros_like(weight) for name, weight in load_file(files[1]).items()}, files[0])
    export_weights(tmp_path / "run", files[2], files[0], 0.25)
    run, mean = load_file(files[1]), load_file(files[2])
    for name, weight in run.items():
        assert torch.allclose(mean[name].float(), 0.25 * weight.float(), rtol=2e-3, atol=1e-6), name


def test_views_come_in_the_plans_shares() -> None:
    start, count = CONTINUED.heads_steps, 400
    drawn = [view_of(step, CONTINUED) for step in range(start + count)]
    assert set(drawn[:start]) == {None}
    for view in CONTINUED.views:
        assert drawn.count(view) / count == pytest.approx(view.share, abs=0.01)


def test_pages_with_gaps_keep_their_text() -> None:
    whole = [sample_page(CORE, "train", 0, index) for index in range(20)]
    gapped = [sample_page(replace(CORE, gap_share=1.0), "train", 0, index) for index in range(20)]
    assert [page.text for page in whole] == [page.text for page in gapped]
    assert any(page.line_boxes[-1][1] > old.line_boxes[-1][1] + 16 for page, old in zip(gapped, whole, strict=True))
    assert all(page.line_boxes[-1][3] <= 512 for page in gapped)


def test_later_pages_have_wide_gaps_inside_their_lines() -> None:
    spec = replace(CORE, spaced_share=1.0)
    texts = [sample_page(spec, "train", 0, index).text for index in range(20)]
    assert sum("    " in text for text in texts) > 15
    assert all(line and line == line.strip() for text in texts for line in text.split("\n"))


def test_later_pages_end_at_the_right_edge_more_often() -> None:
    spec = replace(CORE, full_share=1.0, margin_share=0.0)
    pages = [sample_page(spec, "train", 0, index) for index in range(40)]
    lengths = [len(page.text.rpartition("\n")[2]) for page in pages]
    assert set(lengths) == {30, 31, 32}
    assert all(line and line == line.strip() for page in pages for line in page.text.split("\n"))
    inner = [len(line) for page in pages for line in page.text.split("\n")[:-1]]
    assert min(inner) < 10


def test_the_decoder_is_told_a_share_of_the_characters_wrongly() -> None:
    trainer = Trainer(replace(PLAN, mistake_share=0.2), Clock(1, 1), SMALL)
    pages = [sample_page(PLAN.core, "train", 0, index) for index in range(40)]
    ids = Batch.from_pages(pages, SMALL).ids
    is_wrong = trainer.mistake(ids) != ids
    is_print = (ids > FIRST_BYTE_ID + ord(" ")) & (ids < FIRST_BYTE_ID + 127)
    assert not (is_wrong & ~is_print).any()
    assert 0.1 < float(is_wrong[is_print].float().mean()) < 0.3


def test_the_rate_warms_up_stays_and_decays() -> None:
    plan = Plan(warmup_steps=10)
    assert learning_rate(plan, 0, 0.0) == pytest.approx(plan.peak_rate / 10)
    assert learning_rate(plan, 100, plan.decay_from) == plan.peak_rate
    assert learning_rate(plan, 100, 1.0) == pytest.approx(plan.peak_rate * plan.floor_share)


def test_wide_pages_come_late() -> None:
    plan = Plan()
    early = {training_spec(index, plan, 0.1).fonts for index in range(50)}
    late = {training_spec(index, plan, 0.9).fonts for index in range(50)}
    assert early == {CORE.fonts}
    assert late == {CORE.fonts, WIDE.fonts}


def test_a_batch_says_where_every_token_is_read() -> None:
    pages = [sample_page(CORE, "train", 0, index) for index in range(3)]
    batch = Batch.from_pages(pages)
    for row, page in enumerate(pages):
        count = len(page.text)
        assert decode_ids(batch.ids[row].tolist()) == page.text
        assert batch.ids[row, count] == EOS_ID
        assert int(batch.is_text[row].sum()) == count + 1
        columns, rows = (table[row, :count].tolist() for table in (batch.columns, batch.rows))
        for char, x, y in zip(page.text, columns, rows, strict=True):
            if char not in " \n":
                assert batch.patch_chars[row, y, x] in (ord(char), IGNORED)


@pytest.mark.parametrize(
    ("left", "right", "distance"),
    [("", "", 0), ("", "abc", 3), ("abc", "", 3), ("kitten", "sitting", 3), ("ab", "ba", 2)],
)
def test_edit_distance(left: str, right: str, distance: int) -> None:
    assert edit_distance(left, right) == distance == edit_distance(right, left)


def test_error_rates() -> None:
    assert character_error_rate("abd", "abc") == pytest.approx(1 / 3)
    assert mean_error_rate(["a", "x"], ["a", "y"]) == 0.5
