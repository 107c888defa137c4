"""Loop stop: ends an answer that repeats itself in a way that the n-gram guard cannot prevent.

A loop is an output whose last `repeated_tokens` tokens all equal the token a fixed distance before them, where the
distance is at most half of that: at least three exact copies in a row. The guard breaks cycles that fit into its
window; the loop stop handles longer cycles and endless whitelisted table cells. The answer ends with the finish reason
"length" and the stop reason "repetition", at the latest when this many tokens were repeated.

vLLM's own `repetition_detection` is not suitable: it compares every pattern length after every token in Python, counts
copies instead of tokens (twenty empty cells are no loop, twenty paragraphs are), is off unless a request asks for it,
and ends with a finish reason that OpenAI's clients do not know. Requests that ask for it still get it.

The loop stop is on by default for requests with an image. The default is set with
`--additional-config '{"loop_stop": {"repeated_tokens": 512}}'`, or `{"loop_stop": false}`. A request sets
`vllm_xargs: {"repeated_tokens": 256}`, or 0 to turn it off. It does not end requests that must not end by themselves
(`ignore_eos`, `min_tokens` not reached).
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
"""Tokens between two checks of an output. A check takes the same time for any number of new tokens."""
# A child of vLLM's logger, so that its configuration applies.
_logger = logging.getLogger(f"vllm.{__name__}")


class LoopWatch:
    """Watches one output for loops, in constant time per token."""

    def __init__(self, repeated_tokens: int) -> None:
        """Create the watch.

        Args:
            repeated_tokens: `is_looping` returns true before more tokens than this were repeated.
        """
        self.repeated_tokens = repeated_tokens
        # The next check may be a stride away.
        self._needed = repeated_tokens - _STRIDE + 1
        self._longest_cycle = repeated_tokens // 2
        # The output reversed, one character per token, so that `str.find` finds the shortest cycle first.
        self._backwards = ""
        self._num_seen = 0

    def is_looping(self, output: Sequence[int]) -> bool:
        """Return whether the output ends in a loop. Call it whenever the output has grown by a stride."""
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
    """Decides for a scheduler's requests; keeps a request's state as long as the request exists."""

    def __init__(self, default: int) -> None:
        """Create the loop stop.

        Args:
            default: repeated tokens for requests with an image that do not set them; 0 is off.
        """
        self._default = default
        self._watches: WeakKeyDictionary[Any, LoopWatch | None] = WeakKeyDictionary()

    def must_end(self, request: Any) -> bool:
        """Return whether vLLM's request must end now. Call it whenever its output has grown by a stride."""
        watch = self._watch(request)
        if watch is None or request.num_output_tokens < request.sampling_params.min_tokens:
            return False
        if not watch.is_looping(request.output_token_ids):
            return False
        _logger.info("Request %s repeats itself: ended after %d tokens", request.request_id, request.num_output_tokens)
        return True

    def _watch(self, request: Any) -> LoopWatch | None:
        if request not in self._watches:
            params = request.sampling_params
            repeated = repeated_tokens_of(params.extra_args or {}, self._default if request.mm_features else 0)
            self._watches[request] = LoopWatch(repeated) if repeated and not params.ignore_eos else None
        return self._watches[request]


def repeated_tokens_of(arguments: Mapping[str, Any], default: int) -> int:
    """Return the value in a request's `vllm_xargs`, or the default.

    Raises:
        ValueError: the value is neither 0 nor large enough.
    """
    return _checked(arguments.get(ARGUMENT, default), ARGUMENT)


def _checked(value: object, name: str) -> int:
    if type(value) is not int or 0 != value < MIN_REPEATED_TOKENS:
        raise ValueError(f"`{name}` must be 0 or an integer of at least {MIN_REPEATED_TOKENS}, not {value!r}.")
    return value


def config_of(vllm_config: Any, key: str) -> Any:
    """Return this plugin's section of `--additional-config` under a key; empty if there is none."""
    additional = vllm_config.additional_config
    return additional.get(key, {}) if isinstance(additional, Mapping) else {}


def configured_tokens(vllm_config: Any) -> int:
    """Return the configured repeated tokens; 0 is off.

    Raises:
        ValueError: the configuration is invalid.
    """
    given = config_of(vllm_config, CONFIG_KEY)
    if given is False:
        return 0
    if not isinstance(given, Mapping) or set(given) - {ARGUMENT}:
        raise ValueError(f"additional_config.{CONFIG_KEY} must be false or an object with only {ARGUMENT}")
    return _checked(given.get(ARGUMENT, DEFAULT_REPEATED_TOKENS), f"{CONFIG_KEY}.{ARGUMENT}")


def configure(vllm_config: Any) -> None:
    """Make vLLM build its scheduler with `build_scheduler`. Call it before the engine is built.

    Raises:
        ValueError: the configuration is invalid.
    """
    configured_tokens(vllm_config)
    scheduler_config = vllm_config.scheduler_config
    if vllm_config.model_config.runner_type == "pooling":
        return
    if scheduler_config.scheduler_cls is not None:
        _logger.warning("The loop stop is off: scheduler_cls is set to %s", scheduler_config.scheduler_cls)
        return
    scheduler_config.scheduler_cls = QUALIFIED_NAME


def count_stops(max_model_len: int) -> None:
    """Count the answers that the loop stop ends. Call it in the API process: the scheduler's exports no metrics."""
    watch_early_length_ends(max_model_len, _count_stop)


def _count_stop(output: Sequence[int]) -> None:
    metrics.REPETITION_STOPS.inc()
    metrics.WASTED_TOKENS.labels(STOP_REASON).inc(repeated_at_end(output))


def repeated_at_end(output: Sequence[int]) -> int:
    """Return how many tokens the loop at the end of an output has repeated; 0 without such a loop."""
    backwards = "".join(map(chr, output))[::-1]
    cycle = backwards.find(backwards[: MIN_REPEATED_TOKENS - _STRIDE + 1], 1)
    if cycle < 0:
        return 0
    pairs = zip(backwards, backwards[cycle:], strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def build_scheduler(vllm_config: Any, **rest: Any) -> Any:
    """Build vLLM's scheduler with the loop stop; vLLM calls this instead of the class in `scheduler_cls`."""
    loop_stop = LoopStop(configured_tokens(vllm_config))
    return build_watched_scheduler(loop_stop.must_end, _STRIDE, STOP_REASON, vllm_config=vllm_config, **rest)
