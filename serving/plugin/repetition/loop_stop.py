"""Loop stop: an answer that has fallen into a repetition which the n-gram guard cannot break is cut.

A loop is an output whose last `repeated_tokens` tokens all equal the token a fixed distance before them, the distance
being at most half of that: three copies or more in a row, word for word. The guard breaks cycles that fit into its
window; longer ones, and whitelisted table cells without end, are left to this. The answer ends with the finish reason
"length" and the stop reason "repetition", at the latest when so many tokens were repeated.

vLLM's own `repetition_detection` does not fit: it compares every pattern length after every token in Python, counts
copies and not tokens (twenty empty cells are no loop, twenty paragraphs are), is off unless a request asks for it, and
ends with a finish reason that OpenAI's clients do not know. It still works for requests that ask for it.

On by default for requests with an image, with `--additional-config '{"loop_stop": {"repeated_tokens": 512}}'` as what
is left out, or `{"loop_stop": false}`. A request sets `vllm_xargs: {"repeated_tokens": 256}`, or 0 to turn it off.
Requests that may not end by themselves (`ignore_eos`, `min_tokens` not reached) are left alone.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from serving.plugin.interfaces import metrics
from serving.plugin.interfaces.vllm_internals import build_watched_scheduler, watch_early_length_ends

STOP_REASON = "repetition"
CONFIG_KEY = "loop_stop"
ARGUMENT = "repeated_tokens"
QUALIFIED_NAME = "serving.plugin.repetition.loop_stop.build_scheduler"
DEFAULT_REPEATED_TOKENS = 512
MIN_REPEATED_TOKENS = 64
_STRIDE = 16
"""Tokens between two looks at an output. A look takes about as long as any number of tokens in Python would."""
# In the name of vLLM's loggers, so that its configuration shows it.
_logger = logging.getLogger(f"vllm.{__name__}")


class LoopWatch:
    """Watches one output for loops, in constant time per token."""

    def __init__(self, repeated_tokens: int) -> None:
        """repeated_tokens: `is_looping` turns true before more tokens than this were repeated."""
        self.repeated_tokens = repeated_tokens
        # It may take a stride until we look.
        self._needed = repeated_tokens - _STRIDE + 1
        self._longest_cycle = repeated_tokens // 2
        # The output backwards, a character per token: the shortest cycle is then what C finds first.
        self._backwards = ""
        self._num_seen = 0

    def is_looping(self, output: Sequence[int]) -> bool:
        """Whether the output ends in a loop. To be asked with every output that has grown by a stride."""
        if len(output) < self._num_seen:
            self._backwards, self._num_seen = "", 0
        reach = self._needed + self._longest_cycle
        new = output[max(self._num_seen, len(output) - reach) :]
        self._num_seen = len(output)
        self._backwards = ("".join(map(chr, new))[::-1] + self._backwards)[:reach]
        if len(self._backwards) <= self._needed:
            return False
        return self._backwards.find(self._backwards[: self._needed], 1) > 0


class LoopStop:
    """Decides for the requests of a scheduler; keeps what it knows of one for as long as the request lives."""

    def __init__(self, default: int) -> None:
        """default: repeated tokens of requests with an image that do not say; 0 leaves them alone."""
        self._default = default
        self._watches: WeakKeyDictionary[Any, LoopWatch | None] = WeakKeyDictionary()

    def must_end(self, request: Any, num_new: int) -> bool:
        """Whether a request (vLLM's) that has just got so many output tokens is to be cut now."""
        if request.num_output_tokens % _STRIDE >= num_new:
            return False
        watch = self._watch(request)
        if watch is None or request.num_output_tokens < request.sampling_params.min_tokens:
            return False
        if not watch.is_looping(request.output_token_ids):
            return False
        _logger.info("Request %s repeats itself: cut after %d tokens", request.request_id, request.num_output_tokens)
        return True

    def _watch(self, request: Any) -> LoopWatch | None:
        if request not in self._watches:
            params = request.sampling_params
            repeated = repeated_tokens_of(params.extra_args or {}, self._default if request.mm_features else 0)
            self._watches[request] = LoopWatch(repeated) if repeated and not params.ignore_eos else None
        return self._watches[request]


def repeated_tokens_of(arguments: Mapping[str, Any], default: int) -> int:
    """What a request's `vllm_xargs` say, or the default.

    Raises:
        ValueError: neither 0 nor large enough.
    """
    return _checked(arguments.get(ARGUMENT, default), ARGUMENT)


def _checked(value: object, name: str) -> int:
    if type(value) is not int or 0 != value < MIN_REPEATED_TOKENS:
        raise ValueError(f"`{name}` has to be 0 or an integer of at least {MIN_REPEATED_TOKENS}, got {value!r}.")
    return value


def config_of(vllm_config: Any, key: str) -> Any:
    """This plugin's part of `--additional-config` under a key; empty when there is none."""
    additional = vllm_config.additional_config
    return additional.get(key, {}) if isinstance(additional, Mapping) else {}


def configured_tokens(vllm_config: Any) -> int:
    """Repeated tokens as configured, 0 for off. Raises ValueError when the configuration cannot be understood."""
    given = config_of(vllm_config, CONFIG_KEY)
    if given is False:
        return 0
    if not isinstance(given, Mapping) or set(given) - {ARGUMENT}:
        raise ValueError(f"additional_config.{CONFIG_KEY}: only {ARGUMENT} can be set, or false")
    return _checked(given.get(ARGUMENT, DEFAULT_REPEATED_TOKENS), f"{CONFIG_KEY}.{ARGUMENT}")


def configure(vllm_config: Any) -> None:
    """Have vLLM build its scheduler through `build_scheduler`. Called before the engine is built."""
    configured_tokens(vllm_config)
    scheduler_config = vllm_config.scheduler_config
    if vllm_config.model_config.runner_type == "pooling":
        return
    if scheduler_config.scheduler_cls is not None:
        _logger.warning("The loop stop is off: scheduler_cls is set to %s", scheduler_config.scheduler_cls)
        return
    scheduler_config.scheduler_cls = QUALIFIED_NAME


def count_stops(max_model_len: int) -> None:
    """Count what the loop stop cuts, in the process that takes requests: the scheduler's process shows no metrics."""
    watch_early_length_ends(max_model_len, _count_stop)


def _count_stop(output: Sequence[int]) -> None:
    metrics.REPETITION_STOPS.inc()
    metrics.WASTED_TOKENS.labels(STOP_REASON).inc(repeated_at_end(output))


def repeated_at_end(output: Sequence[int]) -> int:
    """How many tokens the loop that an output ends in has repeated; 0 without one that the loop stop would cut."""
    backwards = "".join(map(chr, output))[::-1]
    cycle = backwards.find(backwards[: MIN_REPEATED_TOKENS - _STRIDE + 1], 1)
    if cycle < 0:
        return 0
    pairs = zip(backwards, backwards[cycle:], strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def build_scheduler(vllm_config: Any, **rest: Any) -> Any:
    """vLLM's own scheduler with the loop stop in it; stands in for the class in `scheduler_cls`."""
    loop_stop = LoopStop(configured_tokens(vllm_config))
    return build_watched_scheduler(loop_stop.must_end, STOP_REASON, vllm_config=vllm_config, **rest)
