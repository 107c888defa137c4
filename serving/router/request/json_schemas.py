"""Finds JSON schemas with circular references. Pure.

A schema may refer to itself through a property or an item: that describes a tree. One that refers to itself only
through `$ref`, `allOf`, `anyOf` and `oneOf` says nothing about a value, and a grammar made from it accepts nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_CHOICES = ("allOf", "anyOf", "oneOf")


def is_circular(schema: Mapping[str, Any]) -> bool:
    """Whether any part of the schema refers to itself without a property or an item in between."""
    done: set[int] = set()
    return any(id(part) not in done and _reaches_itself(part, schema, done) for part in _parts(schema))


def _reaches_itself(start: Mapping[str, Any], schema: Mapping[str, Any], done: set[int]) -> bool:
    """Depth first, without recursion: a schema of 64 kB can be a chain of thousands."""
    on_path = {id(start)}
    stack = [(start, _next(start, schema))]
    while stack:
        part, following = stack[-1]
        step = next(following, None)
        if step is None:
            stack.pop()
            on_path.discard(id(part))
            done.add(id(part))
        elif id(step) in on_path:
            return True
        elif id(step) not in done:
            on_path.add(id(step))
            stack.append((step, _next(step, schema)))
    return False


def _next(part: Mapping[str, Any], schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The schemas that the same value has to satisfy as well."""
    target = _resolve(part.get("$ref"), schema)
    if target is not None:
        yield target
    for key in _CHOICES:
        choices = part.get(key)
        if isinstance(choices, list):
            yield from (choice for choice in choices if isinstance(choice, dict))


def _resolve(reference: Any, schema: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The target of a reference within the schema (RFC 6901); None for any other reference."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    found: Any = schema
    for step in reference[1:].split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict):
            found = found.get(name)
        elif isinstance(found, list) and name.isdecimal() and len(name) < 6 and int(name) < len(found):
            found = found[int(name)]
        else:
            return None
    return found if isinstance(found, dict) else None


def _parts(schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    left: list[Any] = [schema]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            yield value
            left.extend(value.values())
        elif isinstance(value, list):
            left.extend(value)
