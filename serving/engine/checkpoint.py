"""Locates a checkpoint and checks that it is complete, before an engine spends a minute finding out that it is not."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from serving.errors import SettingsError
from serving.settings.stack import NANO

CHECKPOINTS_DIR = Path("checkpoints")
_INDEX = "model.safetensors.index.json"
_CONFIG = "config.json"


def resolve_checkpoint(checkpoint: str, checkpoints: Path = CHECKPOINTS_DIR) -> str:
    """Return the absolute path of a folder, since replicas run in another one; a repository's name is unchanged.

    Raises:
        SettingsError: the folder does not exist.
    """
    if checkpoint == NANO:
        return str((checkpoints / NANO).absolute())
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        return str(folder.absolute())
    if checkpoint.startswith((".", "/", "~")):
        raise SettingsError(f"checkpoint {checkpoint}: there is no such folder")
    return checkpoint


def check_checkpoint(folder: Path) -> None:
    """Compare the sizes of the weight files with their headers. Reads a few kilobytes of each file.

    Raises:
        SettingsError: a file is missing, truncated or not a safetensors file; the message names it.
    """
    _read_json(folder / _CONFIG)
    files = set(folder.glob("*.safetensors"))
    index = folder / _INDEX
    if index.exists():
        named = _read_json(index).get("weight_map")
        if not isinstance(named, dict):
            raise SettingsError(f"checkpoint {index}: it has no weight_map; download the checkpoint again")
        files |= {folder / str(name) for name in named.values()}
    for file in sorted(files):
        try:
            with safe_open(file, framework="numpy"):
                pass
        except FileNotFoundError:
            raise SettingsError(f"checkpoint {file}: {_INDEX} names it, and it is not there") from None
        except (SafetensorError, OSError) as error:
            size = f"{file.stat().st_size:,} bytes" if file.exists() else "missing"
            raise SettingsError(
                f"checkpoint {file}: cut short or damaged ({size}; {error}); download it again"
            ) from None
    if not files and not any(folder.glob("*.bin")) and not any(folder.glob("*.pt")):
        raise SettingsError(f"checkpoint {folder}: there are no weights (*.safetensors) in this folder")


def _read_json(file: Path) -> dict[str, object]:
    try:
        found = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise SettingsError(f"checkpoint {file.parent}: there is no {file.name} in this folder") from None
    except (OSError, ValueError) as error:
        raise SettingsError(f"checkpoint {file}: cannot be read ({error})") from None
    if not isinstance(found, dict):
        raise SettingsError(f"checkpoint {file}: is no JSON object")
    return found
