"""vLLM's own front end, fed by hand, against the usage that is read off it. Fails loudly when its inside moves."""

from __future__ import annotations

import inspect
import time
import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from serving.engine.backends import _check_family, _Watcher
from serving.engine.token_counts import EngineUsage
from serving.errors import SettingsError
from serving.plugin.interfaces import vllm_internals

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's and torch's imports warn of themselves; ours are not meant here
    from vllm import SamplingParams
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
    from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
    from vllm.v1.engine.parallel_sampling import ParentRequest
    from vllm.v1.metrics.stats import IterationStats, PrefillStats

PROMPT = list(range(12))


class FrontEnd:
    """The part of an `AsyncLLM` that counts, without an engine behind it."""

    def __init__(self, *, log_stats: bool = True) -> None:
        self.output_processor = OutputProcessor(None, log_stats=log_stats)
        self.usage = EngineUsage()
        self.num_generated = 0
        self.num_prompted = 0
        vllm_internals.watch_sequences(self, _Watcher(self.usage, vllm_internals.sequence_counts))

    def add(self, engine_id: str, *, n: int = 1, with_image: bool = False) -> list[str]:
        """What `AsyncLLM.add_request` does; returns the names of the sequences."""
        params = SamplingParams(n=n, max_tokens=99, detokenize=False, output_kind=RequestOutputKind.DELTA)
        image = MultiModalFeatureSpec(None, "image", "hash", PlaceholderRange(offset=1, length=7))
        request = EngineCoreRequest(
            request_id=f"{engine_id}-internal",
            external_req_id=engine_id,
            prompt_token_ids=PROMPT,
            mm_features=[image] if with_image else None,
            sampling_params=params,
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        queue = RequestOutputCollector(params.output_kind, request.request_id)
        if n == 1:
            self.output_processor.add_request(request, None, None, 0, queue)
            return [request.request_id]
        parent, names = ParentRequest(request), []
        for index in range(n):
            child = SimpleNamespace(**{name: getattr(request, name) for name in request.__struct_fields__})
            child.params = params
            child.request_id, child.sampling_params = parent.get_child_info(index)
            self.output_processor.add_request(child, None, parent, index, queue)
            names.append(child.request_id)
        return names

    def step(self, tokens: dict[str, int], ending: tuple[str, ...] = (), prefilled: tuple[str, ...] = ()) -> None:
        """The engine has made so many tokens for these sequences, and these end with them."""
        outputs = [
            EngineCoreOutput(
                name,
                [5] * number,
                finish_reason=FinishReason.LENGTH if name in ending else None,
                prefill_stats=PrefillStats(len(PROMPT), 8, 4, 4) if name in prefilled else None,
            )
            for name, number in tokens.items()
        ]
        stats = IterationStats() if self.output_processor.log_stats else None
        self.output_processor.process_outputs(outputs, time.monotonic(), stats)
        if stats is not None:  # what vLLM adds to vllm:generation_tokens_total and vllm:prompt_tokens_total
            self.num_generated += stats.num_generation_tokens
            self.num_prompted += stats.num_prompt_tokens

    def abort(self, name: str, *, internal: bool = True) -> None:
        self.output_processor.abort_requests((name,), internal)


def found(front: FrontEnd, request_id: str) -> tuple[int, int, int, int, str, bool]:
    usage = front.usage.find(request_id)
    assert usage is not None
    numbers = (usage[f"{kind}_tokens"] for kind in ("prompt", "image", "cached", "completion"))
    return (*numbers, usage["finish_reason"], usage["is_finished"])


def test_a_request_is_followed_to_its_end() -> None:
    front = FrontEnd()
    (name,) = front.add("chatcmpl-a", with_image=True)
    assert found(front, "a") == (0, 0, 0, 0, "", False), "nothing was computed yet"
    front.step({name: 1}, prefilled=(name,))
    assert found(front, "a") == (12, 7, 4, 1, "", False)
    front.step({name: 3})
    front.step({name: 1}, ending=(name,))
    assert found(front, "a") == (12, 7, 4, 5, "length", True)
    assert (front.num_prompted, front.num_generated) == (12, 5)


@pytest.mark.parametrize("internal", [True, False])
def test_an_aborted_request_counts_what_was_made_for_it(internal: bool) -> None:
    front = FrontEnd()
    (name,) = front.add("chatcmpl-a")
    front.step({name: 2}, prefilled=(name,))
    front.abort(name if internal else "chatcmpl-a", internal=internal)
    front.step({name: 1})  # was on its way; vLLM does not count it either
    assert found(front, "a") == (12, 0, 4, 2, "abort", True)
    assert front.num_generated == 2
    front.abort(name)
    front.abort("chatcmpl-a", internal=False)
    assert found(front, "a") == (12, 0, 4, 2, "abort", True)


def test_a_request_that_was_aborted_while_it_waited_used_nothing() -> None:
    front = FrontEnd()
    (name,) = front.add("chatcmpl-a", with_image=True)
    front.abort(name)
    assert found(front, "a") == (0, 0, 0, 0, "abort", True)


def test_an_aborted_request_with_several_answers_counts_them_all() -> None:
    front = FrontEnd()
    names = front.add("chatcmpl-a", n=3)
    front.step(dict.fromkeys(names, 2), prefilled=tuple(names))
    front.step({names[0]: 1}, ending=(names[0],))
    front.abort("chatcmpl-a-internal")
    assert found(front, "a") == (12, 0, 4, 7, "abort", True)
    assert front.num_generated == 7
    assert front.num_prompted == 36, "vLLM counts the prompt for each answer, OpenAI's usage does not"
    assert front.usage.totals()["prompt_tokens"] == 12


def test_without_statistics_tokens_are_counted_by_what_came() -> None:
    front = FrontEnd(log_stats=False)
    (name,) = front.add("cmpl-a-0")
    front.step({name: 2})
    front.step({name: 1}, ending=(name,))
    assert found(front, "a") == (12, 0, 0, 3, "length", True)


def test_the_parts_of_the_front_end_that_are_watched_exist() -> None:
    parameters = {
        "add_request": ["self", "request", "prompt", "parent_req", "request_index", "queue"],
        "abort_requests": ["self", "request_ids", "internal"],
        "_update_stats_from_finished": ["self", "req_state", "finish_reason", "iteration_stats"],
    }
    for name, expected in parameters.items():
        assert list(inspect.signature(getattr(OutputProcessor, name)).parameters) == expected
    source = inspect.getsource(OutputProcessor.process_outputs)
    assert "self._update_stats_from_finished(" in source, "the hook that tells of every end"


def test_every_stream_ends_with_usage_and_no_other_frame_has_it_unless_asked() -> None:
    from vllm.entrypoints.generate.base.protocol import StreamOptions
    from vllm.entrypoints.openai.chat_completion import serving as chat
    from vllm.entrypoints.openai.completion import serving as completion

    originals = {module: module.should_include_usage for module in (chat, completion)}
    try:
        vllm_internals.end_streams_with_usage()
        for module in (chat, completion):
            decide: Any = module.should_include_usage
            assert decide(None, False) == (True, False)
            assert decide(StreamOptions(include_usage=False), False) == (True, False)
            assert decide(StreamOptions(include_usage=True), False) == (True, False)
            assert decide(StreamOptions(include_usage=True, continuous_usage_stats=True), False) == (True, True)
            assert decide(None, True) == (True, True)
            assert "should_include_usage(" in inspect.getsource(module)
    finally:
        for module, original in originals.items():
            module.should_include_usage = original


def test_the_size_of_the_kv_cache_is_told() -> None:
    from vllm.config import CacheConfig

    fields = CacheConfig.__dataclass_fields__
    assert {"kv_cache_size_tokens", "num_gpu_blocks", "block_size"} <= set(fields)
    cache = SimpleNamespace(kv_cache_size_tokens=None, num_gpu_blocks=10, block_size=16)
    assert vllm_internals.kv_cache_tokens(SimpleNamespace(cache_config=cache)) == 160
    cache.kv_cache_size_tokens = 150
    assert vllm_internals.kv_cache_tokens(SimpleNamespace(cache_config=cache)) == 150


async def test_a_checkpoint_of_another_family_is_refused_before_it_is_loaded() -> None:
    def told(architectures: list[str] | None) -> Any:
        return SimpleNamespace(read_architectures=lambda checkpoint, revision: architectures)

    for known in (["DeepseekOCRForCausalLM"], ["UnlimitedOCRForCausalLM"], None):
        await _check_family(told(known), "ocr", "some/repository", None)
    with pytest.raises(SettingsError, match=r"^models\.ocr\.checkpoint some/repository: .* LlamaForCausalLM, and"):
        await _check_family(told(["LlamaForCausalLM"]), "ocr", "some/repository", None)
