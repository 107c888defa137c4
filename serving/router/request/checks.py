"""The checks that fields' tables are made of: one value each. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from serving.errors import InvalidRequestError

Check = Callable[[str, Any], bool | None]
"""Raises InvalidRequestError for a value that the field may not have, and returns True for one that has no effect here.
Never called with null."""

MAX_INT = 2**31 - 1


def refuse(key: str, reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"{key} must be {reason}.", param=key)


def anything(key: str, value: Any) -> None:
    """The field is checked elsewhere, or ignored."""


def flag(key: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise refuse(key, "true or false")


def whole(low: int, high: int) -> Check:
    """Numbers in other forms (1e6, "1000000", true) are refused as well, since the engine would accept them."""

    def check(key: str, value: Any) -> None:
        if type(value) is not int or not low <= value <= high:
            raise refuse(key, f"a whole number from {low} to {high}")

    return check


def number(low: float, high: float, *, is_open: bool = False) -> Check:
    """From `low`, or above it if `is_open`, up to and including `high`."""

    def check(key: str, value: Any) -> None:
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or not low <= value <= high or (is_open and value == low):
            raise refuse(key, f"a number from {low:g} to {high:g}" + (f", not {low:g} itself" if is_open else ""))

    return check


def text(max_chars: int) -> Check:
    def check(key: str, value: Any) -> None:
        if not isinstance(value, str) or len(value) > max_chars:
            raise refuse(key, f"a string of at most {max_chars} characters")

    return check


def one_of(*allowed: str) -> Check:
    def check(key: str, value: Any) -> None:
        if not isinstance(value, str) or value not in allowed:
            raise refuse(key, f"one of {', '.join(allowed)}")

    return check


def texts(max_items: int, max_chars: int) -> Check:
    def check(key: str, value: Any) -> None:
        is_list = isinstance(value, list) and len(value) <= max_items
        if not is_list or not all(isinstance(text, str) and 0 < len(text) <= max_chars for text in value):
            raise refuse(key, f"a list of at most {max_items} strings of 1 to {max_chars} characters")

    return check


def token_ids(max_items: int) -> Check:
    def check(key: str, value: Any) -> None:
        is_list = isinstance(value, list) and len(value) <= max_items
        if not is_list or not all(type(token) is int and 0 <= token <= MAX_INT for token in value):
            raise refuse(key, f"a list of at most {max_items} token ids")

    return check


def an_object(key: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise refuse(key, "an object")
