"""What a run leaves behind: all of it, for going on as if it had not stopped, and 8 bits of it, for going on elsewhere.

The whole state is a file of PyTorch's, `training.pt`, some 150 MB with the optimiser's. The small one is the running
mean of all weights, read-outs included, each row of a tensor in 8 bits with a scale of its own, compressed; the
optimiser starts anew from it.
"""

import io
import json
import os
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MAGIC = b"NANO8BIT"
MAX_BYTES = 12_000_000
"""Of a small state."""


def _replace(file: Path, data: bytes) -> None:
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, file)


def save_whole(state: Mapping[str, Any], file: Path) -> None:
    """Write a state so that a reader sees the old one or the new one, never a part."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    _replace(file, buffer.getvalue())


def load_whole(file: Path) -> dict[str, Any]:
    """Read what `save_whole` wrote."""
    state: dict[str, Any] = torch.load(file, weights_only=True)
    return state


def pack(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> bytes:
    """Return float tensors in 8 bits, vectors in 16, and what `about` says (JSON) in front of them."""
    entries, parts = [], []
    for name, tensor in tensors.items():
        values = tensor.detach().float()
        entries.append([name, list(values.shape)])
        if values.dim() < 2:
            parts.append(values.half().numpy().tobytes())
            continue
        rows = values.flatten(1)
        scales = rows.abs().amax(1).clamp(min=1e-12) / 127
        parts.append(scales.numpy().astype(np.float32).tobytes())
        parts.append((rows / scales[:, None]).round().to(torch.int8).numpy().tobytes())
    head = json.dumps({"about": dict(about), "tensors": entries}).encode()
    body = zlib.compress(b"".join(parts), 6)
    return _MAGIC + struct.pack("<I", len(head)) + head + body


def unpack(data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what `pack` was given, the tensors rounded to 8 bits.

    Raises:
        ValueError: the bytes are not of `pack`.
    """
    if data[: len(_MAGIC)] != _MAGIC:
        raise ValueError("not a small state of a training run")
    start = len(_MAGIC) + 4
    (length,) = struct.unpack("<I", data[len(_MAGIC) : start])
    head = json.loads(data[start : start + length])
    body = zlib.decompress(data[start + length :])
    tensors, at = {}, 0
    for name, shape in head["tensors"]:
        count = int(np.prod(shape))
        if len(shape) < 2:
            tensors[name] = torch.from_numpy(np.frombuffer(body, np.float16, count, at).astype(np.float32)).view(shape)
            at += 2 * count
            continue
        scales = np.frombuffer(body, np.float32, shape[0], at)
        at += 4 * shape[0]
        rows = np.frombuffer(body, np.int8, count, at).reshape(shape[0], -1)
        at += count
        tensors[name] = torch.from_numpy(rows.astype(np.float32) * scales[:, None]).view(shape)
    return tensors, head["about"]


def save_small(tensors: Mapping[str, Tensor], about: Mapping[str, Any], folder: Path, keep: int) -> Path:
    """Write a small state, named by its step, and delete all but the newest `keep`."""
    file = folder / f"state-{about['step']:07}.nano8"
    _replace(file, pack(tensors, about))
    for old in sorted(folder.glob("state-*.nano8"))[:-keep]:
        old.unlink()
    return file
