"""Where settings come from: a YAML file, overridden by the environment. The keys file is read by this module as well.

`SERVING__ROUTER__PORT=9000` sets `router.port`. Each part of a variable's name matches a key of the file regardless of
case, with `_` for any other punctuation (`DEEPSEEK_OCR` matches `deepseek-ocr`). New keys are lowercased, except for a
replica's environment variables (`...__ENV__OMP_NUM_THREADS=2`), which keep their case.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from serving.errors import SettingsError

ENV_PREFIX = "SERVING__"
_VERBATIM = "env"
"""Below this key, names and values are a process's environment and are taken literally."""
_TYPED = "engine_args"
"""Below this key, values have the type that YAML gives them, since nothing else says what vLLM expects."""


def read_yaml(file: Path, sections: Collection[str]) -> dict[str, Any]:
    """Read the file's mapping.

    Raises:
        SettingsError: the file cannot be read, is not plain YAML, or is not a mapping with text keys.
    """
    try:
        with file.open() as stream:
            given = yaml.load(stream, Loader=_StrictLoader)  # a SafeLoader
    except OSError as error:
        raise SettingsError(f"{file}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date, or bytes that are not UTF-8
        raise SettingsError(f"{file}: is not YAML: {error}") from error
    if not isinstance(given, dict):
        raise SettingsError(f"{file}: must hold a mapping with the keys {', '.join(sections)}")
    for key in given:
        if not isinstance(key, str):
            raise SettingsError(f"{file}: {key!r}: a key must be text")
    return given


class _StrictLoader(yaml.SafeLoader):
    """Refuses duplicate keys in a mapping, of which YAML's own loader silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def overlay(given: dict[str, Any], environ: Mapping[str, str], sections: Collection[str]) -> dict[tuple[str, ...], str]:
    """Override the file's values with the environment's, in place.

    Returns:
        The name of the variable behind every path that the environment sets.

    Raises:
        SettingsError: a variable names a section that does not exist, or a key below a value that is not a mapping.
    """
    origins: dict[tuple[str, ...], str] = {}
    # Sorted, so that a section as a whole is applied before the keys inside it.
    for variable in sorted(environ):
        if not variable.upper().startswith(ENV_PREFIX):
            continue
        parts = variable[len(ENV_PREFIX) :].split("__")
        if parts[0].lower() not in sections:
            known = ", ".join(name.upper() for name in sections)
            raise SettingsError(f"environment {variable}: unknown section {parts[0].lower()!r}; there are {known}")
        path = _place(given, parts, environ[variable], variable)
        origins[path] = variable
    return origins


def _place(target: dict[str, Any], parts: list[str], text: str, variable: str) -> tuple[str, ...]:
    path: list[str] = []
    for part in parts[:-1]:
        path.append(_find_key(target, part, path))
        below = target.get(path[-1])
        if below is None:
            below = {}
        if not isinstance(below, dict):
            raise SettingsError(f"environment {variable}: {'.'.join(path)} is no mapping that could hold more")
        target[path[-1]] = dict(below)
        target = target[path[-1]]
    key = _find_key(target, parts[-1], path)
    target[key] = _merge(target.get(key), _read_value(text, [*path, key], variable))
    return (*path, key)


def _merge(below: Any, above: Any) -> Any:
    """Merge a mapping into a mapping key by key; any other value replaces the old one."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return {**below, **{key: _merge(below.get(key), value) for key, value in above.items()}}


def _find_key(target: Mapping[str, Any], part: str, path: list[str]) -> str:
    if _VERBATIM in path:
        return part
    wanted = _plain(part)
    return next((key for key in target if _plain(str(key)) == wanted), part.lower())


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "_", name.lower())


def _read_value(text: str, path: list[str], variable: str) -> Any:
    """Return the value as text, unless it is a list, a mapping or an engine argument, which are parsed as YAML."""
    if _VERBATIM in path[:-1] or not (_TYPED in path or text.lstrip().startswith(("[", "{"))):
        return text
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise SettingsError(f"environment {variable}: {'.'.join(path)}: is not YAML: {error}") from error
