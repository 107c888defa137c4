"""The served model, loaded from a checkpoint by vLLM's own loader, without an engine around it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_CPU = torch.device("cpu")


@contextlib.contextmanager
def one_process_world(folder: Path) -> Iterator[None]:
    """vLLM's process groups of one, which its parallel layers ask for."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state as groups

    with set_current_vllm_config(VllmConfig()):
        groups.init_distributed_environment(1, 0, f"file://{folder / 'meeting'}", 0, "gloo")
        groups.initialize_model_parallel(1, 1)
    try:
        yield
    finally:
        groups.destroy_model_parallel()
        groups.destroy_distributed_environment()


def engine_config(checkpoint: Path, dtype: str, **more: Any) -> Any:
    """Return vLLM's configuration of an engine for a checkpoint, with the plugin's changes."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    environment = dict(os.environ)
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    try:
        load_general_plugins()
        args = EngineArgs(str(checkpoint), dtype=dtype, max_model_len=2048, enforce_eager=True, **more)
        return args.create_engine_config()
    finally:  # vLLM sets variables of its own for the processes that it would start
        os.environ.clear()
        os.environ |= environment


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model with its weights, and what was seen of them before vLLM packed them for this processor."""

    model: Any
    blank: list[str]
    """Parameters that the file did not fill."""
    num_values: int
    """Of all parameters."""


def load_model(checkpoint: Path, dtype: str, device: torch.device = _CPU) -> LoadedModel:
    """Load the model as an engine does; vLLM refuses tensors of the file that the model lacks."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
    from vllm.utils.torch_utils import set_default_torch_dtype

    config = engine_config(checkpoint, dtype)
    with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype), torch.no_grad():
        with device:
            model = initialize_model(config)
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
        get_model_loader(config.load_config).load_weights(model, config.model_config)
        blank = [name for name, parameter in model.named_parameters() if parameter.isnan().any()]
        num_values = sum(parameter.numel() for parameter in model.parameters())
        process_weights_after_loading(model, config.model_config, device)
    return LoadedModel(model.eval(), blank, num_values)


def build_blank_model(checkpoint: Path, device: torch.device) -> Any:
    """Return the model on a device without weights: on `meta` it computes shapes only."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.model_loader.utils import initialize_model

    config = engine_config(checkpoint, "float32")
    with set_current_vllm_config(config), device:
        model = initialize_model(config)
    for module in model.modules():
        if isinstance(module, LinearBase):  # as vLLM sets it for a CPU when weights are loaded
            module.cpu_linear = torch.nn.functional.linear
    return model.eval()
