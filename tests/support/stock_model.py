"""The reference of the plugin's tests: vLLM's own implementation at the nano sizes."""

from __future__ import annotations

import types

from benchmarks.stock import import_stock
from benchmarks.stock import patch_sizes as _patch_sizes
from serving.nano.config import NANO

__all__ = ["import_stock", "patch_sizes"]


def patch_sizes(stock: types.ModuleType) -> None:
    _patch_sizes(stock, NANO)
