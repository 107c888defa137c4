"""The guard in both of vLLM's interfaces, against vLLM's own rule over batches that change as its model runners do."""

from __future__ import annotations

import types
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
from vllm.v1.sample.logits_processor import LogitsProcessor as HostProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as DeviceProcessor

from serving.plugin.repetition import ngram_guard
from serving.plugin.repetition.ngram_bans import NGramBans
from serving.plugin.repetition.ngram_guard import DeviceGuard, HostGuard, NGramGuard, configure

IMAGE, CELL, VOCABULARY, MAX_LENGTH = 7, 5, 10, 96
LETTERS = st.integers(0, 5)


class Tokenizer:
    def get_vocab(self) -> dict[str, int]:
        return {"<image>": IMAGE, "<td>": CELL}


@pytest.fixture(autouse=True)
def _tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngram_guard, "cached_tokenizer_from_config", lambda model_config: Tokenizer())


def engine_config(additional: Any = None, **model: Any) -> Any:
    default = {"max_model_len": MAX_LENGTH, "runner_type": "generate", "logits_processors": None}
    default["architecture"] = "DeepseekOCRForCausalLM"
    return types.SimpleNamespace(
        additional_config={} if additional is None else additional,
        model_config=types.SimpleNamespace(**(default | model)),
        scheduler_config=types.SimpleNamespace(async_scheduling=False),
        speculative_config=None,
        use_v2_model_runner=False,
    )


@dataclass
class Sequence:
    """A request and the rule that is to hold for it, None for none."""

    arguments: dict[str, Any]
    prompt: list[int] | None
    output: list[int] = field(default_factory=list)

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(extra_args=self.arguments or None)

    def rule(self) -> tuple[int, int, set[int]] | None:
        size = self.arguments.get("ngram_size", 3 if IMAGE in (self.prompt or []) else 0)
        white = self.arguments.get("whitelist_token_ids", [CELL])
        return (size, self.arguments.get("window_size", 12), set(white)) if size else None

    def banned(self, stock: types.ModuleType, output: list[int] | None = None) -> set[int]:
        rule = self.rule()
        if rule is None:
            return set()
        logits = torch.zeros(VOCABULARY)
        stock.NoRepeatNGramLogitsProcessor(*rule)(self.output if output is None else output, logits)
        return banned(logits)


DEFAULTS = {"ngram_guard": {"size": 3, "window": 12}}


def banned(logits: torch.Tensor) -> set[int]:
    return set(torch.isinf(logits).nonzero().flatten().tolist())


@st.composite
def sequences(draw: st.DrawFn, *, may_embed: bool = True) -> Sequence:
    arguments: dict[str, Any] = {}
    if draw(st.booleans()):
        arguments["ngram_size"] = draw(st.integers(0, 5))
    if draw(st.booleans()):
        arguments["window_size"] = draw(st.integers(1, 30))
    if draw(st.booleans()):
        arguments["whitelist_token_ids"] = draw(st.lists(LETTERS, max_size=3))
    prompts = [st.just([1, IMAGE, IMAGE, 2]), st.lists(LETTERS, min_size=1, max_size=4)]
    prompt = draw(st.one_of(*prompts, st.none()) if may_embed else st.one_of(*prompts))
    return Sequence(arguments, prompt, draw(st.lists(LETTERS, max_size=20)))


class PersistentBatch:
    """Adds, removes, condenses and swaps rows as vLLM's `InputBatch` does, and tells of it in a `BatchUpdate`."""

    def __init__(self, processor: Any) -> None:
        self.processor, self.rows, self.waiting = processor, list[Sequence](), list[Sequence]()

    def step(self, draw: st.DataObject, new: list[Sequence]) -> None:
        """Some rows leave (finished, or preempted and back later with their output), some come, two may be swapped."""
        gone = sorted(draw.draw(st.sets(st.integers(0, 9)).map(lambda rows: {r for r in rows if r < len(self.rows)})))
        back = self.waiting if draw.draw(st.booleans()) else []
        self.waiting = [one for one in self.waiting if one not in back]
        # A resumed request comes with a list of its own.
        coming = [Sequence(one.arguments, one.prompt, list(one.output)) for one in back] + new
        self.waiting += [self.rows[row] for row in gone if draw.draw(st.booleans())]
        rows: dict[int, Sequence] = {row: one for row, one in enumerate(self.rows) if row not in gone}
        added, moved, holes = [], [], list(gone)
        for one in coming:
            row = holes.pop(0) if holes else len(rows)
            rows[row] = one
            added.append((row, one.params, one.prompt, one.output))
        while holes and max(rows, default=-1) > holes[0]:
            last = max(rows)
            moved.append((last, holes[0], MoveDirectionality.UNIDIRECTIONAL))
            rows[holes.pop(0)] = rows.pop(last)
        removed = [row for row in gone if row not in {row for row, *_ in added}]
        if len(rows) > 1 and draw.draw(st.booleans()):
            first, second = draw.draw(st.permutations(range(len(rows))))[:2]
            moved.append((first, second, MoveDirectionality.SWAP))
            rows[first], rows[second] = rows[second], rows[first]
        self.rows = [rows[row] for row in range(len(rows))]
        changes = any((removed, added, moved))
        update = BatchUpdate(len(rows), sorted(removed, reverse=True), added, moved) if changes else None
        self.processor.update_state(update)


@settings(max_examples=150, deadline=None)
@given(draw=st.data())
def test_host_guard_bans_what_vllms_processor_bans_however_the_batch_changes(
    stock: types.ModuleType, draw: st.DataObject
) -> None:
    batch = PersistentBatch(NGramGuard(engine_config(DEFAULTS), torch.device("cpu"), False))
    for _ in range(draw.draw(st.integers(1, 12))):
        batch.step(draw, draw.draw(st.lists(sequences(), max_size=3)))
        for _ in range(draw.draw(st.integers(1, 6))):
            logits = batch.processor.apply(torch.zeros(len(batch.rows), VOCABULARY))
            assert [banned(row) for row in logits] == [one.banned(stock) for one in batch.rows]
            for one in batch.rows:
                one.output += draw.draw(st.lists(LETTERS, min_size=1, max_size=1) | st.just([]))
            batch.processor.update_state(None)


def device_state(num_slots: int) -> Any:
    """What Model Runner V2 shows to processors, on the CPU."""

    def buffer(*shape: int) -> Any:
        tensor = torch.zeros(shape, dtype=torch.int32)
        return types.SimpleNamespace(gpu=tensor, np=tensor.numpy())

    return types.SimpleNamespace(
        device=torch.device("cpu"),
        max_num_reqs=num_slots,
        vocab_size=VOCABULARY,
        all_token_ids=buffer(num_slots, MAX_LENGTH),
        prompt_len=buffer(num_slots),
        prefill_len=buffer(num_slots),
        total_len=buffer(num_slots),
    )


class SlottedBatch:
    """Keeps requests in slots as Model Runner V2 does; rows come in any order, one per draft token and one more."""

    def __init__(self, num_slots: int) -> None:
        self.state = device_state(num_slots)
        self.processor = NGramGuard(engine_config(DEFAULTS), self.state)
        self.slots: dict[int, Sequence] = {}

    def write(self, slot: int) -> None:
        one = self.slots[slot]
        tokens = torch.tensor((one.prompt or []) + one.output, dtype=torch.int32)
        self.state.all_token_ids.gpu[slot, : len(tokens)] = tokens
        self.state.total_len.gpu[slot] = len(tokens)

    def add(self, slot: int, one: Sequence) -> bool:
        self.slots[slot] = one
        self.state.prompt_len.gpu[slot] = len(one.prompt or [])
        self.write(slot)
        return self.processor.add_request(slot, one.params)

    def apply(self, order: list[int], drafts: list[list[int]]) -> list[set[int]]:
        counts = [len(draft) + 1 for draft in drafts]
        last = [([*(self.slots[slot].prompt or []), *self.slots[slot].output] or [0])[-1] for slot in order]
        inputs = [token for first, draft in zip(last, drafts, strict=True) for token in (first, *draft)]
        local = torch.tensor([position for count in counts for position in range(count)])
        slots = torch.tensor([slot for slot, count in zip(order, counts, strict=True) for _ in range(count)])
        totals = self.state.total_len.gpu[slots]
        context = LogitsContext(
            expanded_idx_mapping=slots.to(torch.int32),
            idx_mapping=torch.tensor(order, dtype=torch.int32),
            idx_mapping_np=np.array(order),
            expanded_local_pos=local.to(torch.int32),
            input_ids=torch.tensor(inputs, dtype=torch.int32),
            pos=totals + local - 1,
            seq_lens_upper_bound_np=self.state.total_len.np[order] + np.array(counts),
        )
        return [banned(row) for row in self.processor.apply(torch.zeros(len(slots), VOCABULARY), context)]


@settings(max_examples=150, deadline=None)
@given(draw=st.data())
def test_device_guard_bans_the_same_and_sees_draft_tokens(stock: types.ModuleType, draw: st.DataObject) -> None:
    batch = SlottedBatch(5)
    for _ in range(draw.draw(st.integers(1, 8))):
        for slot in draw.draw(st.sets(st.integers(0, 4), min_size=0 if batch.slots else 1)):
            batch.add(slot, draw.draw(sequences(may_embed=False)))
        batch.processor.apply_staged_writes()
        for _ in range(draw.draw(st.integers(1, 4))):
            order = draw.draw(st.permutations(sorted(batch.slots)))
            drafts = [draw.draw(st.lists(LETTERS, max_size=3)) for _ in order]
            wanted = [
                batch.slots[slot].banned(stock, batch.slots[slot].output + draft[:end])
                for slot, draft in zip(order, drafts, strict=True)
                for end in range(len(draft) + 1)
            ]
            assert batch.apply(order, drafts) == wanted
            for slot in order:
                batch.slots[slot].output += draw.draw(st.lists(LETTERS, min_size=1, max_size=2))
                batch.write(slot)


def test_device_guard_in_parts_bans_the_same(stock: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngram_guard, "_MAX_COMPARED", 1)
    batch = SlottedBatch(3)
    for slot, letter in enumerate((1, 2, CELL)):
        batch.add(slot, Sequence({}, [IMAGE], [letter] * 10))
    batch.processor.apply_staged_writes()
    assert batch.apply([2, 0, 1], [[], [], []]) == [set(), {1}, {2}]


def test_device_guard_tells_vllm_which_requests_it_may_touch() -> None:
    batch = SlottedBatch(2)
    assert batch.add(0, Sequence({}, [IMAGE]))
    assert not batch.add(0, Sequence({"ngram_size": 0}, [IMAGE]))
    assert not batch.add(1, Sequence({"ngram_size": 5, "window_size": 4}, [IMAGE]))
    batch.processor.apply_staged_writes()
    logits = torch.zeros(1, VOCABULARY)
    context = types.SimpleNamespace(idx_mapping_np=np.array([0, 1]))
    assert batch.processor.apply(logits, context) is logits


def test_device_guard_forgets_the_request_that_had_the_slot() -> None:
    batch = SlottedBatch(1)
    for prompt, wanted in (([IMAGE, 1], {1}), ([1, 1], set()), ([IMAGE, 2], {1})):
        batch.add(0, Sequence({}, prompt, [1] * 5))
        batch.processor.apply_staged_writes()
        assert batch.apply([0], [[]]) == [wanted]


def test_is_what_both_runners_load_and_makes_the_one_that_is_asked_for() -> None:
    assert issubclass(NGramGuard, HostProcessor)
    assert issubclass(NGramGuard, DeviceProcessor)
    made = NGramGuard(engine_config(), torch.device("cpu"), False)
    assert isinstance(made, HostGuard)
    assert made.is_argmax_invariant() is False
    assert isinstance(NGramGuard(engine_config(), device_state(2)), DeviceGuard)


def test_a_batch_without_guarded_rows_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    processor = NGramGuard(engine_config(), torch.device("cpu"), False)
    for name in ("open", "advance"):
        monkeypatch.setattr(NGramBans, name, lambda *_: pytest.fail("no row is guarded"))
    processor.update_state(BatchUpdate(1, [], [(0, SamplingParams(), [1, 2], [])], []))
    logits = torch.zeros(1, VOCABULARY)
    assert processor.apply(logits) is logits


def test_placeholders_of_asynchronous_scheduling_are_not_taken_for_tokens() -> None:
    processor = NGramGuard(engine_config(DEFAULTS), torch.device("cpu"), False)
    output = [1, 1, 1]
    processor.update_state(BatchUpdate(1, [], [(0, SamplingParams(), [IMAGE], output)], []))
    assert banned(processor.apply(torch.zeros(1, VOCABULARY))[0]) == {1}
    output.append(-1)
    processor.update_state(None)
    assert banned(processor.apply(torch.zeros(1, VOCABULARY))[0]) == set()
    output[-1:] = [2, 1, 1]
    assert banned(processor.apply(torch.zeros(1, VOCABULARY))[0]) == {1, 2}


def test_refuses_to_run_where_it_would_only_see_placeholders() -> None:
    config = engine_config()
    config.scheduler_config.async_scheduling = True
    with pytest.raises(ValueError, match="--logits-processors"):
        NGramGuard(config, torch.device("cpu"), False)
    configure(config)
    NGramGuard(config, torch.device("cpu"), False)


@pytest.mark.parametrize(
    "arguments",
    [
        {"ngram_size": -1},
        {"ngram_size": True},
        {"ngram_size": "30"},
        {"ngram_size": 30.0},
        {"window_size": 0},
        {"whitelist_token_ids": 5},
        {"whitelist_token_ids": ["<td>"]},
        {"whitelist_token_ids": [2**31]},
        {"whitelist_token_ids": list(range(2000))},
        {"repeated_tokens": 1},
    ],
)
def test_refuses_arguments_that_cannot_be_meant(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        NGramGuard.validate_params(SamplingParams(extra_args=arguments))


@pytest.mark.parametrize(
    "arguments", [None, {}, {"ngram_size": 0}, {"ngram_size": 2**63, "window_size": 2**63 + 1}, {"other": "x"}]
)
def test_takes_what_can_be_meant(arguments: dict[str, Any] | None) -> None:
    params = SamplingParams(extra_args=arguments)
    NGramGuard.validate_params(params)
    processor = NGramGuard(engine_config(), torch.device("cpu"), False)
    processor.update_state(BatchUpdate(1, [], [(0, params, [IMAGE], [1] * 40)], []))
    processor.apply(torch.zeros(1, VOCABULARY))


def test_the_recipe_is_the_default() -> None:
    defaults = ngram_guard.GuardDefaults.from_config(engine_config(max_model_len=8192))
    assert (defaults.rule.size, defaults.rule.window, defaults.rule.whitelist) == (30, 90, {CELL})
    assert defaults.image_token_id == IMAGE


def test_defaults_are_configured() -> None:
    given = {"ngram_guard": {"size": 4, "window": 40, "whitelist": ["<td>", 3, "<unknown>"]}}
    rule = ngram_guard.GuardDefaults.from_config(engine_config(given)).rule
    assert (rule.size, rule.window, rule.whitelist) == (4, 40, {CELL, 3})
    assert ngram_guard.GuardDefaults.from_config(engine_config({"ngram_guard": False})).rule.bans_nothing
    for wrong in (True, 5, {"sizes": 1}, {"size": "30"}, {"window": 0}):
        with pytest.raises(ValueError, match="ngram_guard"):
            ngram_guard.GuardDefaults.from_config(engine_config({"ngram_guard": wrong}))


def test_configures_the_engine_to_load_it_once() -> None:
    config = engine_config(logits_processors=["mine:Own"])
    configure(config)
    configure(config)
    assert config.model_config.logits_processors == ["mine:Own", ngram_guard.QUALIFIED_NAME]


def test_leaves_engines_alone_that_have_no_logits_processors() -> None:
    pooling = engine_config(runner_type="pooling")
    configure(pooling)
    assert pooling.model_config.logits_processors is None


def test_speculation_without_logits_processors_is_refused_unless_the_guard_is_off() -> None:
    speculative = engine_config()
    speculative.speculative_config = object()
    with pytest.raises(ValueError, match=r"remove speculative_config, or set additional_config\.ngram_guard to false"):
        configure(speculative)
    unguarded = engine_config({"ngram_guard": False})
    unguarded.speculative_config = object()
    configure(unguarded)
    assert unguarded.model_config.logits_processors is None
    speculative.use_v2_model_runner = True
    configure(speculative)
    assert speculative.model_config.logits_processors == [ngram_guard.QUALIFIED_NAME]


def test_vllms_loaders_of_both_runners_take_the_name() -> None:
    from vllm.v1.sample.logits_processor import _load_logitsprocs_by_fqcns
    from vllm.v1.worker.gpu.sample.logits_processor.loader import _load_v2_logitsprocs_by_fqcns

    for load in (_load_logitsprocs_by_fqcns, _load_v2_logitsprocs_by_fqcns):
        assert load([ngram_guard.QUALIFIED_NAME]) == [NGramGuard]


@pytest.mark.parametrize(
    ("architecture", "size", "window"),
    [
        ("DeepseekOCRForCausalLM", 30, 90),
        ("DeepseekOCR2ForCausalLM", 30, 90),
        ("UnlimitedOCRForCausalLM", 35, 128),
        ("SomeOtherForCausalLM", 30, 90),
    ],
)
def test_the_rule_is_the_one_published_with_the_family(architecture: str, size: int, window: int) -> None:
    config = engine_config(architecture=architecture, max_model_len=8192)
    rule = ngram_guard.GuardDefaults.from_config(config).rule
    assert (rule.size, rule.window) == (size, window)
