"""The arguments of `vllm bench serve`, checked by its own parser without running it."""

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
