"""Counts what makes the host wait for a device, without a device.

Tensors on `meta`, PyTorch's device without memory, stand for those on a GPU: operations on them run as on one, reading
a value of one is refused by PyTorch, and each copy to or from it is seen here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("meta")
_READING = {
    *(torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default),
    *(torch.ops.aten.masked_select.default, torch.ops.aten._unique2.default, torch.ops.aten.is_nonzero.default),
}
"""Their result, or its size, is known to the host only when the device has computed it."""
_COPYING = {torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor}
"""They make a tensor of values on the host and copy it from pageable memory, which no dispatch shows on `meta`."""


class HostWaits(TorchDispatchMode):
    """Notes copies between host and device, and operations for whose result the host waits."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        """Copies that block, and operations that read."""
        self.num_copies = 0
        """Copies that do not block."""
        self.num_launches = 0
        """Other operations on the device, views included."""

    def __enter__(self) -> HostWaits:
        self._factories = _Factories(self.waits)
        self._factories.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._factories.__exit__(*raised)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        options = dict(kwargs or {})
        given = [value for value in (*args, *options.values()) if isinstance(value, torch.Tensor)]
        given += [part for value in args if isinstance(value, list | tuple) for part in value if _is_tensor(part)]
        result = func(*args, **options)
        is_on_device = [tensor.device == DEVICE for tensor in given]
        target = result.device == DEVICE if _is_tensor(result) else None
        is_copy = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if func in _READING and any(is_on_device):
            self.waits.append(str(func))
        elif is_copy and ({*is_on_device, target} == {True, False}):
            blocks = not (options.get("non_blocking") or (len(args) > 2 and args[2]))
            if blocks:
                self.waits.append(f"{func} of {tuple(given[-1].shape)}")
            else:
                self.num_copies += 1
        elif any(is_on_device):
            self.num_launches += 1
        return result


class _Factories(TorchFunctionMode):
    """Notes the tensors that are made on the device from values of the host."""

    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_new = func in _COPYING and not (_is_tensor(args[0]) and args[0].device == DEVICE)
        if is_new and result.device == DEVICE:
            self._waits.append(f"{func.__name__} of {tuple(result.shape)}")
        return result


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)
