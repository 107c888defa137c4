from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from serving.engine.checkpoint import check_checkpoint
from serving.errors import SettingsError

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    for number in (1, 2):
        save_file({f"w{number}": np.ones((64, 64), np.float32)}, tmp_path / f"model-{number}.safetensors")
    (tmp_path / INDEX).write_text(
        json.dumps({"weight_map": {"w1": "model-1.safetensors", "w2": "model-2.safetensors"}})
    )
    return tmp_path


def test_a_whole_checkpoint_passes(folder: Path) -> None:
    check_checkpoint(folder)
    (folder / INDEX).unlink()
    check_checkpoint(folder)


@pytest.mark.parametrize("size", [0, 4, 100, 16_000])
def test_a_file_that_is_cut_short_is_named(folder: Path, size: int) -> None:
    file = folder / "model-2.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(SettingsError, match=rf"{file}: cut short or damaged \({size:,} bytes.*download it again"):
        check_checkpoint(folder)


def test_a_page_of_a_download_proxy_is_no_checkpoint(folder: Path) -> None:
    (folder / "model-1.safetensors").write_text("<html>sign in first</html>")
    with pytest.raises(SettingsError, match=r"model-1\.safetensors: cut short or damaged"):
        check_checkpoint(folder)


def test_what_the_index_names_must_be_there(folder: Path) -> None:
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(SettingsError, match=r"model-2\.safetensors: .* names it, and it is not there"):
        check_checkpoint(folder)
    (folder / INDEX).write_text("{}")
    with pytest.raises(SettingsError, match="has no weight_map"):
        check_checkpoint(folder)
    (folder / INDEX).write_text("[")
    with pytest.raises(SettingsError, match="cannot be read"):
        check_checkpoint(folder)


def test_a_folder_without_a_model_is_said_to_be_one(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"there is no config\.json"):
        check_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SettingsError, match="there are no weights"):
        check_checkpoint(tmp_path)
