"""The recipe's no-repeat-n-gram rule inside vLLM, on by default for requests with an image.

vLLM is configured to load `NGramGuard`. Both of its model runners build their logits processors from one list of
classes, but use different interfaces, so `NGramGuard` is a subclass of both and creates the matching guard: `HostGuard`
works incrementally on the host, where Model Runner V1 has the tokens; `DeviceGuard` compares on the device, where V2
has them, so that V2 never waits for a token to reach the host.

A request configures it with `vllm_xargs`, under the names of vLLM's own processor: `ngram_size` (0 turns the guard off;
another size turns it on even without an image), `window_size`, `whitelist_token_ids`. The defaults are set with
`--additional-config '{"ngram_guard": {"size": 30, "window": 90, "whitelist": ["<td>", "</td>"]}}'`, or
`{"ngram_guard": false}` for a guard that is off unless a request turns it on.

The API process imports this module only to check requests, so importing it must be cheap.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
from vllm.v1.sample.logits_processor import LogitsProcessor as HostProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as DeviceProcessor

from serving.plugin.interfaces.vllm_internals import copy_to_device
from serving.plugin.modes.families import DEEPSEEK_OCR, FAMILIES
from serving.plugin.repetition.loop_stop import config_of, repeated_tokens_of

if TYPE_CHECKING:
    from serving.plugin.repetition.ngram_bans import NGramBans

CONFIG_KEY = "ngram_guard"
QUALIFIED_NAME = "serving.plugin.repetition.ngram_guard:NGramGuard"
IMAGE_TOKEN = "<image>"
DEFAULT_WHITELIST = ("<td>", "</td>")
"""The published recipe's; size and window are the family's (`serving.plugin.modes.families`)."""
MAX_WHITELIST = 1024
"""Largest whitelist of a request: on a device every banned token is compared with all of its entries."""
_MAX_COMPARED = 2**26
"""Largest number of comparisons that `ban_repeats` keeps in memory at a time, one byte each."""
# A child of vLLM's logger, so that its configuration applies.
_logger = logging.getLogger(f"vllm.{__name__}")


@dataclass(frozen=True, slots=True)
class NGramRule:
    """A no-repeat-n-gram rule.

    size: n, including the banned token; 0 is off.
    window: how many of the last output tokens are considered.
    whitelist: tokens that are never banned.
    """

    size: int
    window: int
    whitelist: frozenset[int] = frozenset()

    @property
    def bans_nothing(self) -> bool:
        """Whether no token can be banned: for 0 and the sizes for which vLLM's processor bans nothing, which are 1
        (its prefix is then the whole output) and sizes larger than the window."""
        return self.size < 2 or self.size > self.window


@dataclass(frozen=True, slots=True)
class GuardDefaults:
    """The default rule, and the token by which a prompt with an image is recognised."""

    rule: NGramRule
    image_token_id: int | None
    max_length: int
    """Largest number of tokens of a sequence; larger windows are equivalent to it."""

    @classmethod
    def from_config(cls, vllm_config: Any) -> GuardDefaults:
        """Read the configuration.

        Raises:
            ValueError: it is invalid.
        """
        given = config_of(vllm_config, CONFIG_KEY)
        if given is False:
            given = {"size": 0}
        if not isinstance(given, Mapping) or set(given) - {"size", "window", "whitelist"}:
            raise ValueError(f"additional_config.{CONFIG_KEY} must be false or have only size, window, whitelist")
        tokenizer = cached_tokenizer_from_config(vllm_config.model_config)
        vocabulary = {} if tokenizer is None else tokenizer.get_vocab()
        ids = (vocabulary.get(token, token) for token in given.get("whitelist", DEFAULT_WHITELIST))
        # Tokens that the checkpoint does not have are never generated.
        whitelist = frozenset(token for token in ids if isinstance(token, int))
        # Of no family is a model for which somebody has named the guard: it gets DeepSeek-OCR's rule.
        family = FAMILIES.get(vllm_config.model_config.architecture, DEEPSEEK_OCR)
        size = _checked(given.get("size", family.ngram_size), f"{CONFIG_KEY}.size", 0)
        window = _checked(given.get("window", family.ngram_window), f"{CONFIG_KEY}.window", 1)
        max_length = vllm_config.model_config.max_model_len
        return cls(NGramRule(size, window, whitelist), vocabulary.get(IMAGE_TOKEN), max_length)

    def rule_of(self, params: Any) -> tuple[NGramRule, bool]:
        """Return the rule of a request with these sampling parameters, and whether it applies even without an image."""
        given = params.extra_args or {}
        whitelist = given.get("whitelist_token_ids")
        rule = NGramRule(
            given.get("ngram_size", self.rule.size),
            min(given.get("window_size", self.rule.window), self.max_length),
            self.rule.whitelist if whitelist is None else frozenset(whitelist),
        )
        return rule, "ngram_size" in given


def _checked(value: object, name: str, least: int) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"`{name}` must be an integer of at least {least}, not {value!r}.")
    return value


def check_request(params: Any) -> None:
    """Check the guard's and the loop stop's arguments in `vllm_xargs`.

    Raises:
        ValueError: an argument is invalid (vLLM answers 400).
    """
    given = params.extra_args or {}
    if "ngram_size" in given:
        _checked(given["ngram_size"], "ngram_size", 0)
    if "window_size" in given:
        _checked(given["window_size"], "window_size", 1)
    whitelist = given.get("whitelist_token_ids")
    if whitelist is not None:
        is_list = isinstance(whitelist, list | tuple | set | frozenset) and len(whitelist) <= MAX_WHITELIST
        if not is_list or any(type(token) is not int or not 0 <= token < 2**31 for token in whitelist):
            raise ValueError(f"`whitelist_token_ids` must be a list of at most {MAX_WHITELIST} token ids.")
    repeated_tokens_of(given, 0)


def configure(vllm_config: Any) -> None:
    """Make vLLM load the guard for a model of this plugin. Call it before the engine is built.

    The guard is named in the configuration instead of an entry point: Model Runner V1 with asynchronous scheduling
    gives processors the sampled tokens only if the configuration names one, and an entry point would apply to every
    model.

    Raises:
        ValueError: the engine could not run the guard, and the configuration does not say that it is not wanted.
    """
    model_config = vllm_config.model_config
    names = list(model_config.logits_processors or ())
    if model_config.runner_type == "pooling" or QUALIFIED_NAME in names or NGramGuard in names:
        return
    if vllm_config.speculative_config is not None and not vllm_config.use_v2_model_runner:
        if config_of(vllm_config, CONFIG_KEY) is not False:
            raise ValueError(
                "Model Runner V1 runs no logits processors with speculative decoding, so pages would be read without "
                f"the n-gram guard: remove speculative_config, or set additional_config.{CONFIG_KEY} to false."
            )
        return
    model_config.logits_processors = [*names, QUALIFIED_NAME]


class NGramGuard(HostProcessor, DeviceProcessor):
    """Creates the guard for the calling model runner; it has no instances itself."""

    def __new__(cls, vllm_config: Any, *runner: Any) -> Any:
        guard = DeviceGuard if len(runner) == 1 else HostGuard
        return guard(vllm_config, *runner)

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        check_request(sampling_params)


class HostGuard(HostProcessor):
    """For Model Runner V1: handles the whole batch in one call, in constant time per token, and only guarded rows."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        """Create the guard.

        Raises:
            ValueError: this runner would give it placeholders instead of tokens.
        """
        from serving.plugin.repetition.ngram_bans import NGramBans

        if vllm_config.scheduler_config.async_scheduling and not vllm_config.model_config.logits_processors:
            raise ValueError(f"with asynchronous scheduling, name the guard: --logits-processors {QUALIFIED_NAME}")
        self._defaults = GuardDefaults.from_config(vllm_config)
        self._bans: NGramBans = NGramBans(vllm_config.model_config.max_model_len)
        self._guarded: dict[int, tuple[int, list[int]]] = {}  # by row of the batch: seat, output tokens
        self._rows, self._seats = np.empty(0, np.int64), np.empty(0, np.int64)
        self._outputs: list[list[int]] = []

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._drop(row)
        for row, params, prompt, output in batch_update.added:
            self._drop(row)
            rule = self._rule_of(params, prompt)
            if rule is not None:
                self._guarded[row] = (self._bans.open(rule.size, rule.window, rule.whitelist), output)
        for source, target, direction in batch_update.moved:
            self._move(source, target, direction)
        self._rows = np.fromiter(self._guarded, np.int64)
        self._seats = np.array([seat for seat, _ in self._guarded.values()], np.int64)
        self._outputs = [output for _, output in self._guarded.values()]

    def _rule_of(self, params: Any, prompt: list[int] | None) -> NGramRule | None:
        rule, is_asked_for = self._defaults.rule_of(params)
        if rule.bans_nothing:
            return None
        # A prompt of embeddings is None.
        has_image = prompt is not None and self._defaults.image_token_id in prompt
        return rule if is_asked_for or has_image else None

    def _drop(self, row: int) -> None:
        guarded = self._guarded.pop(row, None)
        if guarded is not None:
            self._bans.close(guarded[0])

    def _move(self, source: int, target: int, direction: MoveDirectionality) -> None:
        moved = self._guarded.pop(source, None)
        if direction == MoveDirectionality.SWAP:
            other = self._guarded.pop(target, None)
            if other is not None:
                self._guarded[source] = other
        else:
            self._drop(target)
        if moved is not None:
            self._guarded[target] = moved

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        if not self._outputs:
            return logits
        which, tokens = self._bans.advance(self._seats, self._outputs)
        if len(which):
            index = copy_to_device(np.stack((self._rows[which], tokens)), logits.device)
            logits[index[0], index[1]] = -torch.inf
        return logits


class DeviceGuard(DeviceProcessor):
    """For Model Runner V2: compares the window on the device, so that the host only launches kernels and never waits.

    Whether a prompt has an image is also determined on the device, because this runner does not pass prompts.
    """

    def __init__(self, vllm_config: Any, req_states: LogitsProcRequestState) -> None:
        self._defaults = GuardDefaults.from_config(vllm_config)
        self._states = req_states
        # By slot: size (0 is off) and window. Whitelists have as many columns as the longest so far; -1 is empty.
        self._rules = np.zeros((req_states.max_num_reqs, 2), np.int64)
        self._white = np.empty((req_states.max_num_reqs, 0), np.int64)
        self._is_asked_for = np.zeros(req_states.max_num_reqs, np.bool_)
        self._has_image = torch.zeros(req_states.max_num_reqs, dtype=torch.bool, device=req_states.device)
        self._unseen: set[int] = set()
        """Slots whose prompts have not been searched for images."""
        self._is_stale = True
        self.apply_staged_writes()

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        rule, is_asked_for = self._defaults.rule_of(sampling_params)
        is_off = rule.bans_nothing or not (is_asked_for or self._defaults.image_token_id is not None)
        self._rules[req_idx] = (0, 0) if is_off else (rule.size, rule.window)
        self._write_whitelist(req_idx, frozenset() if is_off else rule.whitelist)
        self._is_asked_for[req_idx] = is_asked_for
        if is_off or is_asked_for:
            self._unseen.discard(req_idx)
        else:
            self._unseen.add(req_idx)
        self._is_stale = True
        return not is_off

    def _write_whitelist(self, slot: int, tokens: frozenset[int]) -> None:
        missing = len(tokens) - self._white.shape[1]
        if missing > 0:
            self._white = np.pad(self._white, ((0, 0), (0, missing)), constant_values=-1)
        self._white[slot] = -1
        self._white[slot, : len(tokens)] = list(tokens)

    def apply_staged_writes(self) -> None:
        if not self._is_stale:
            return
        device = self._states.device
        for slot in self._unseen:
            prompt = self._states.all_token_ids.gpu[slot, : int(self._states.prompt_len.np[slot])]
            self._has_image[slot] = (prompt == self._defaults.image_token_id).any()
        self._unseen.clear()
        is_on = copy_to_device(self._is_asked_for, device) | self._has_image
        self._device_rules = copy_to_device(self._rules, device) * is_on[:, None]
        self._device_white = copy_to_device(self._white, device)
        self._is_stale = False

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        rules = self._rules[ctx.idx_mapping_np]
        size, window = (int(bound) for bound in rules.max(axis=0, initial=0))
        if not size:
            return logits
        window = min(window, int(ctx.seq_lens_upper_bound_np.max()))
        if size > window:
            return logits
        per_chunk = max(1, _MAX_COMPARED // (size * (window + size)))
        for begin in range(0, len(logits), per_chunk):
            part = logits[begin : begin + per_chunk]
            rows = torch.arange(begin, begin + len(part), device=logits.device)
            slots = ctx.expanded_idx_mapping[rows].long()
            tail, lengths = self._tail(rows, slots, ctx, window + size)
            ban_repeats(part, tail, lengths, self._device_rules[slots], self._device_white[slots], size)
        return logits

    def _tail(
        self, rows: torch.Tensor, slots: torch.Tensor, ctx: LogitsContext, width: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return each row's last `width` output tokens, right-aligned, drafts included, and its output's length."""
        states = self._states
        prompt = states.prompt_len.gpu[slots].long()
        committed = states.total_len.gpu[slots].long() - prompt
        lengths = committed + ctx.expanded_local_pos[rows]
        index = lengths[:, None] - torch.arange(width, 0, -1, device=rows.device)
        known = (prompt[:, None] + index).clamp(0, states.all_token_ids.gpu.shape[1] - 1)
        tokens = states.all_token_ids.gpu[slots[:, None], known]
        # The first draft is the input of the row after that of the last committed token.
        drafted = (rows[:, None] + 1 + index - lengths[:, None]).clamp(0, len(ctx.input_ids) - 1)
        return torch.where(index >= committed[:, None], ctx.input_ids[drafted].to(tokens.dtype), tokens), lengths


def ban_repeats(
    logits: torch.Tensor,
    tail: torch.Tensor,
    lengths: torch.Tensor,
    rules: torch.Tensor,
    white: torch.Tensor,
    largest_size: int,
) -> None:
    """Set the logits of each row's banned tokens to minus infinity, without synchronising with the host.

    Args:
        logits: the logits, (rows, vocabulary), changed in place.
        tail: the last output tokens, (rows, width), right-aligned; values before an output's begin are arbitrary.
        lengths: the numbers of output tokens, (rows,).
        rules: size and window, (rows, 2), 0 for no rule; `width` is at least the largest size plus the largest window.
        white: whitelists, (rows, any), padded with -1.
        largest_size: the largest size in `rules`.
    """
    sizes, windows = rules[:, :1], rules[:, 1:]
    prefixes = tail.unfold(1, largest_size - 1, 1)
    # For a smaller size only the last tokens of the prefix are compared.
    is_outside = torch.arange(largest_size - 1, device=tail.device) < largest_size - sizes
    is_banned = ((prefixes[:, :-1] == prefixes[:, -1:]) | is_outside[:, None]).all(-1)
    last = tail[:, largest_size - 1 :].long()
    starts = lengths[:, None] - torch.arange(last.shape[1], 0, -1, device=tail.device) - (sizes - 1)
    is_banned &= (sizes > 1) & (starts >= (lengths[:, None] - windows).clamp(min=0))
    is_banned &= (last[:, :, None] != white[:, None, :]).all(-1)
    last = last.clamp(0, logits.shape[1] - 1)
    values = logits.gather(1, last).masked_fill_(is_banned, -torch.inf)
    # If a token occurs both banned and not, the minimum bans it.
    logits.scatter_reduce_(1, last, values, "amin")
