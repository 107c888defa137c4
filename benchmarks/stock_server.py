"""vLLM's OpenAI server with vLLM's own DeepSeek-OCR at the sizes of a checkpoint: the peer of the server measurements.

`python -m benchmarks.stock_server --model DIR ...` takes vLLM's own arguments. The patches stand at the module's top,
since vLLM's engine process imports this module anew.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["VLLM_PLUGINS"] = "none"  # this project's plugin would take the architecture's place

from vllm import ModelRegistry

from benchmarks.stock import SIZES_FILE, import_stock, patch_mode, patch_sizes
from serving.nano.config import NanoConfig


def install(checkpoint: Path) -> None:
    """Register vLLM's own class under the published name, patched to the checkpoint's sizes and mode."""
    values: dict[str, Any] = json.loads((checkpoint / SIZES_FILE).read_text())
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    sizes = NanoConfig(**fields)
    stock = import_stock()
    patch_sizes(stock, sizes)
    mode = json.loads((checkpoint / "preprocessor_config.json").read_text())
    if "base_size" in mode:
        patch_mode(stock, mode["base_size"], mode["image_size"])
    ModelRegistry.register_model("DeepseekOCRForCausalLM", stock.DeepseekOCRForCausalLM)


if "--model" in sys.argv:
    install(Path(sys.argv[sys.argv.index("--model") + 1]))

if __name__ == "__main__":
    from vllm.entrypoints.launchers.api_server.entry import main

    main()
