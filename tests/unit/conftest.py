from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

from serving.settings.stack import ENV_PREFIX

# A busy machine must not fail a property, and a run must not depend on the one before.
hypothesis.settings.register_profile("unit", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("unit")

MINIMAL = "models: {nano: {checkpoint: nano}}\n"


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in list(os.environ):
        if variable.upper().startswith(ENV_PREFIX):
            monkeypatch.delenv(variable)


@pytest.fixture
def write_settings(tmp_path: Path) -> Callable[..., Path]:
    """Makes a settings file: the smallest one, followed by `text`; or only `text` when `is_whole`."""

    def write(text: str = "", *, is_whole: bool = False) -> Path:
        file = tmp_path / "settings.yaml"
        file.write_text(text if is_whole else MINIMAL + text)
        return file

    return write
