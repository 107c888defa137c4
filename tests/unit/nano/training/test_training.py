"""The trainer at sizes at which a step takes a few hundredths of a second."""

import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import serving.nano.training.train as train
from serving.nano.build import weight_shapes
from serving.nano.config import FREE_PRINT, NanoConfig
from serving.nano.print_tokens import FIRST_CHAR_ID, FIRST_HEIGHT_ID, VOCAB_SIZE, decode_ids
from serving.nano.tokenizer import EOS_ID
from serving.nano.training.batches import IGNORED, OCR_PROMPT, SPACE, Batch
from serving.nano.training.export import checkpoint_weights, export_checkpoint
from serving.nano.training.fonts import MONO_CORE
from serving.nano.training.guides import DecoderWeights, Places, class_logits, last_before, spoil
from serving.nano.training.model import NanoOcr, load_model
from serving.nano.training.plan import Clock, Plan, Stage, rate_share
from serving.nano.training.print_pages import FREE, sample_print
from serving.nano.training.readout import ask
from serving.nano.training.state import MAX_BYTES, load_whole, pack, save_small, save_whole, unpack
from serving.nano.training.train import WHOLE_NAME, Rhythm, Trainer, run_training

pytestmark = pytest.mark.usefixtures("fonts")

SMALL = NanoConfig(
    image_size=128,
    sam_width=32,
    sam_layers=2,
    sam_heads=2,
    neck_channels=32,
    downsample_channels=(64, 64),
    clip_width=64,
    clip_layers=1,
    clip_heads=1,
    dense_size=64,
    num_dense_layers=2,
    expert_size=16,
    num_experts=16,
    vocab_size=VOCAB_SIZE,
)
PAGES = replace(FREE, side_px=128, sizes_px=(20, 26), fonts=((MONO_CORE,),), font_shares=(1.0,), turned_share=0.0)
PLAN = Plan(batch_pages=2, encoder_pages=2, pages=PAGES, dense_chars=(10, 30), text_chars=(24,), warmup_steps=5)
RHYTHM = Rhythm(log_steps=1, measured_pages=2)


def build_trainer(stage: Stage, max_steps: int = 1000) -> Trainer:
    trainer = Trainer(PLAN, Clock(max_steps, 1e9), SMALL)
    trainer.stage = stage
    return trainer


def test_sizes_are_the_vocabularys() -> None:
    assert FREE_PRINT.vocab_size == VOCAB_SIZE
    assert sum(int(np.prod(shape)) for shape in weight_shapes(FREE_PRINT).values()) <= 12_500_000


@pytest.mark.parametrize("stage", Stage)
def test_losses_are_finite_and_reach_all_that_a_stage_trains(stage: Stage) -> None:
    trainer = build_trainer(stage)
    trainer.clock.step = 1  # one of the decoder's in the alternating stage
    before = {name: p.detach().clone() for name, p in trainer.named.items()}
    values = trainer.step()
    assert all(np.isfinite(value) for value in values.values())
    moved = {name for name, p in trainer.named.items() if not torch.equal(p, before[name])}
    assert any("sam_model" in name for name in moved) is (stage is not Stage.ALTERNATING)
    assert any("layers.3.self_attn" in name for name in moved) is (stage is not Stage.ENCODER)
    assert any("vision_model" in name for name in moved)
    assert any("families" in name for name in moved) is (stage is not Stage.ENCODER)


@pytest.mark.parametrize("stage", [Stage.ENCODER, Stage.JOINT])
def test_bfloat16_gives_nearly_the_losses_of_float32(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = build_trainer(stage).step()
    monkeypatch.setattr(train, "_quickest_precision", lambda: torch.autocast("cpu", torch.bfloat16))
    found = build_trainer(stage).step()
    assert found.keys() == wanted.keys()
    assert found["loss"] == pytest.approx(wanted["loss"], rel=0.03)


@pytest.mark.parametrize("stage", [Stage.ENCODER, Stage.JOINT])
def test_it_learns(stage: Stage) -> None:
    trainer = build_trainer(stage)
    losses = [trainer.step()["loss"] for _ in range(30)]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


@pytest.mark.parametrize("stage", Stage)
def test_a_restored_run_takes_the_same_next_step(stage: Stage, tmp_path: Path) -> None:
    trainer = build_trainer(stage)
    for _ in range(3):
        trainer.step()
    save_whole(trainer.state(), tmp_path / WHOLE_NAME)
    wanted = trainer.step()
    restored = Trainer(PLAN, Clock(1000, 1e9), SMALL)
    restored.restore(load_whole(tmp_path / WHOLE_NAME))
    assert restored.step() == wanted
    for name, parameter in trainer.named.items():
        assert torch.equal(parameter, restored.named[name]), name
    for name, mean in trainer.average.items():
        assert torch.equal(mean, restored.average[name]), name


def test_a_stopped_run_goes_on_from_its_directory(tmp_path: Path) -> None:
    clock = Clock(100_000, 1e9)

    def interrupt() -> None:
        while clock.step < 3:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    run_training(tmp_path, PLAN, clock, RHYTHM, SMALL)
    thread.join()
    stopped_at = clock.step
    assert 3 <= stopped_at < 100_000
    again = Clock(stopped_at + 2, 1e9)
    run_training(tmp_path, PLAN, again, RHYTHM, SMALL)
    assert again.step == stopped_at + 2
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, stopped_at + 3))
    measured = [row for row in rows if "A" in row]
    assert measured
    assert {"core_minutes", "stage", "B", "C", "U", "A patches"} <= measured[-1].keys()


def test_another_run_goes_on_from_a_small_state(tmp_path: Path) -> None:
    trainer = build_trainer(Stage.ALTERNATING)
    trainer.step()
    file = save_small(trainer.average, trainer.about(), tmp_path, keep=2)
    resumed = run_training(tmp_path / "other", PLAN, Clock(2, 1e9), RHYTHM, SMALL, resume=file)
    assert resumed.clock.step == 2
    assert resumed.started_at == 1


def test_only_the_newest_small_states_are_kept(tmp_path: Path) -> None:
    trainer = build_trainer(Stage.ENCODER)
    for step in range(4):
        trainer.clock.step = step
        save_small(trainer.average, trainer.about(), tmp_path, keep=2)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["state-0000002.nano8", "state-0000003.nano8"]


def test_a_small_state_is_small_and_close() -> None:
    torch.manual_seed(0)
    trainer = Trainer(replace(PLAN, pages=FREE), Clock(10, 1e9))
    data = pack(trainer.average, trainer.about())
    assert len(data) <= MAX_BYTES
    tensors, about = unpack(data)
    assert about == trainer.about()
    assert tensors.keys() == trainer.average.keys()
    for name, tensor in trainer.average.items():
        largest = tensor.flatten(1).abs().amax(1, keepdim=True) if tensor.dim() > 1 else tensor.abs().max()
        error = (tensors[name] - tensor).flatten(1) if tensor.dim() > 1 else tensors[name] - tensor
        assert (error.abs() <= largest / 250 + 1e-7).all(), name


def test_what_is_not_a_state_is_refused() -> None:
    with pytest.raises(ValueError, match="not a small state"):
        unpack(b"something else")


def test_an_export_loads_and_reads_as_the_run_does(tmp_path: Path) -> None:
    trainer = build_trainer(Stage.JOINT)
    trainer.step()
    file = save_small(trainer.average, trainer.about(), tmp_path, keep=1)
    trainer.average, _ = unpack(file.read_bytes())
    export_checkpoint(file, tmp_path / "checkpoint", SMALL)
    assert {name: tuple(w.shape) for name, w in load_file(tmp_path / "checkpoint" / "model.safetensors").items()} == (
        weight_shapes(SMALL)
    )
    model = load_model(tmp_path / "checkpoint", SMALL)
    pages = trainer.batch(3, is_dense=False).pages
    with trainer.averaged(), torch.no_grad():
        wanted = trainer.model.encode(pages).cells
        ours, theirs = (one.model.embed_tokens.weight for one in (trainer.model, model))
        torch.testing.assert_close(theirs, ours, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(model.encode(pages).cells, wanted, atol=0.05, rtol=0.05)
    assert all(len(ids) <= 4 for ids in model.generate(pages, OCR_PROMPT, 4))
    assert json.loads((tmp_path / "checkpoint" / "config.json").read_text())["vocab_size"] == VOCAB_SIZE


def test_a_state_of_other_sizes_is_refused() -> None:
    trainer = build_trainer(Stage.ENCODER)
    with pytest.raises(ValueError, match="not of this model"):
        checkpoint_weights(dict(trainer.average), FREE_PRINT)


def test_stages_end_by_what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build_trainer(Stage.ENCODER)
    trainer.advance(0.5)
    assert trainer.stage is Stage.ENCODER
    trainer.clock.step = 7
    trainer.advance(0.95)
    assert (trainer.stage, trainer.started_at) == (Stage.ALTERNATING, 7)
    trainer.told = 0.5
    trainer.advance(0.95)
    assert trainer.stage is Stage.ALTERNATING
    trainer.told = 0.95
    trainer.advance(0.95)
    assert trainer.stage is Stage.JOINT


def test_stages_end_when_their_share_of_the_budget_is_gone() -> None:
    trainer = build_trainer(Stage.ENCODER, max_steps=100)
    trainer.clock.step = 30
    trainer.advance(0.1)
    assert trainer.stage is Stage.ALTERNATING
    trainer.clock.step = 70
    trainer.advance(0.1)
    assert trainer.stage is Stage.JOINT
    assert trainer._told_share() == PLAN.told_share
    trainer.clock.step = 99
    assert trainer._told_share() < 0.1


def test_the_rate_warms_up_and_decays() -> None:
    assert rate_share(PLAN, 0, 0.0) == pytest.approx(0.2)
    assert rate_share(PLAN, 50, PLAN.decay_from) == 1.0
    assert rate_share(PLAN, 50, 1.0) == pytest.approx(PLAN.floor_share)
    assert rate_share(PLAN, 0, 0.5) == pytest.approx(0.2)


def test_the_decoder_starts_by_reading_what_the_read_outs_read() -> None:
    trainer = build_trainer(Stage.ENCODER)
    trainer.advance(0.95)
    attention = trainer.model.model.layers[-2].self_attn
    outputs = attention.o_proj.weight @ attention.v_proj.weight
    # What any of the heads brings goes to dimensions 128 to 192.
    norms = outputs.detach().norm(dim=1)
    assert norms[128:192].min() > 2 * norms[:128].max()


@pytest.fixture(scope="module")
def batch() -> Batch:
    pages = [sample_print(FREE, "train", 0, index) for index in range(3)]
    return Batch.from_pages(pages, np.random.default_rng(0))


def test_a_batch_says_what_stands_where(batch: Batch) -> None:
    places = Places.of(batch, FREE_PRINT)
    for row in range(3):
        count = int(batch.is_text[row].sum())
        assert int(batch.ids[row, count - 1]) == EOS_ID
        text = decode_ids(batch.ids[row].tolist())
        assert len(text) == count - 1
        first = 0
        for index, char in enumerate(text):
            x, y = batch.centers[row, index].tolist()
            assert int(places.cell[row, index]) == 1 + int(y // 64) * 9 + int(x // 64)
            assert int(places.region[row, index]) == int(y % 64 // 16) * 4 + int(x % 64 // 16)
            assert int(places.line_cell[row, index]) == int(places.cell[row, first])
            if char == "\n":
                first = index + 1
            wanted = batch.centers[row, index + (char in " \n")]
            assert torch.equal(batch.goals[row, index], wanted)


def test_questions_are_asked_of_the_vision_token_that_shows_the_place(batch: Batch) -> None:
    asked = ask(batch, FREE_PRINT, is_noisy=False)
    count = int(batch.is_text.sum())
    assert torch.equal(asked.wanted[:count], batch.classes[batch.is_text])
    assert torch.equal(asked.at[:count], batch.centers[batch.is_text])
    steps = (asked.at // 64).long()
    assert torch.equal(asked.cell, steps[:, 1] * 8 + steps[:, 0])
    blanks = asked.at[count : count + batch.blanks.shape[0] * batch.blanks.shape[1]]
    assert len(blanks) == batch.blanks.shape[0] * batch.blanks.shape[1]


def test_blank_places_are_blank(batch: Batch) -> None:
    for row in range(3):
        shown = batch.centers[row][batch.is_text[row]]
        for place in batch.blanks[row]:
            distance = (shown - place).abs()
            assert not ((distance[:, 0] < 8) & (distance[:, 1] < 8)).any()


def test_the_last_mark_before_a_place() -> None:
    marks = torch.tensor([[False, True, False, False, True, False]])
    assert last_before(marks).tolist() == [[-1, -1, 1, 1, 1, 4]]


def test_logits_of_characters_are_those_of_their_tokens_together() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, VOCAB_SIZE)
    shares = logits.exp()
    found = class_logits(logits).exp()
    torch.testing.assert_close(found[:, 3], shares[:, FIRST_CHAR_ID + 24 : FIRST_CHAR_ID + 32].sum(1))
    torch.testing.assert_close(found[:, -1], shares[:, EOS_ID])
    assert found.shape[1] == SPACE + 3


def test_spoilt_text_is_nearly_the_text(batch: Batch) -> None:
    torch.manual_seed(0)
    ids = batch.ids[batch.is_text][None]
    placed = ids >= FIRST_HEIGHT_ID
    shifted = spoil(ids, DecoderWeights(shifted=1.0, wrong=0.0))
    assert decode_ids(shifted[0].tolist()) == decode_ids(ids[0].tolist())
    assert (shifted != ids)[placed].float().mean() > 0.9
    assert torch.equal(shifted[~placed], ids[~placed])
    wrong = spoil(ids, DecoderWeights(shifted=0.0, wrong=0.5))
    assert 0.2 < (wrong != ids).float().mean() < 0.8
    assert torch.equal(spoil(ids, DecoderWeights(shifted=0.0, wrong=0.0)), ids)


def test_padding_counts_for_nothing() -> None:
    pages = [sample_print(PLAN.spec(0, is_dense=False), "train", 0, index) for index in range(2)]
    trainer = build_trainer(Stage.JOINT)
    narrow = Batch.from_pages(pages, np.random.default_rng(0))
    assert narrow.ids.shape[1] == 64
    assert IGNORED < 0
    with torch.no_grad():
        trainer.plan = replace(PLAN, told_share=1.0, decoder=DecoderWeights(shifted=0.0, wrong=0.0, attention=0.0))
        cells = trainer.model.encode(narrow.pages).cells
        wide = replace(
            narrow,
            **{
                name: torch.nn.functional.pad(getattr(narrow, name), (0, 64) if name != "centers" else (0, 0, 0, 64))
                for name in ("is_text", "classes", "centers")
            },
            ids=torch.nn.functional.pad(narrow.ids, (0, 64), value=2),
        )
        one, other = (trainer._text_terms(cells, batch) for batch in (narrow, wide))
    for name in ("text", "early", "whereabouts", "code", "router", "told"):
        torch.testing.assert_close(one[name], other[name], atol=1e-4, rtol=1e-4)


def test_a_model_of_these_sizes_has_the_checkpoints_tensors() -> None:
    weights = {name: tuple(weight.shape) for name, weight in NanoOcr(FREE_PRINT).state_dict().items()}
    assert weights == weight_shapes(FREE_PRINT)
