"""The number format that `dtype: auto` means on a processor without a GPU.

vLLM takes the checkpoint's, which is bfloat16 for the published one. Processors without instructions for it emulate it,
and one page can then take minutes in the encoder alone: they are given float32, in twice the memory.
"""

from __future__ import annotations

from pathlib import Path

_CPU_INFO = Path("/proc/cpuinfo")
_FLAGS = {"amx_bf16", "avx512_bf16", "bf16"}
"""Names of the instructions, by which the kernel lists them: of x86, x86 and ARM."""


def computes_in_bfloat16(cpu_info: str) -> bool:
    """Return whether every processor in the kernel's list has instructions for bfloat16 products."""
    lines = [line for line in cpu_info.splitlines() if line.partition(":")[0].strip() in ("flags", "Features")]
    return bool(lines) and all(_FLAGS & {*line.partition(":")[2].split()} for line in lines)


def choose_dtype(given: str, is_cpu: bool, cpu_info: str | None = None) -> str:
    """Return the `dtype` to pass to vLLM.

    Args:
        given: that of the engine arguments.
        is_cpu: whether vLLM was built for processors without a GPU.
        cpu_info: the content of `/proc/cpuinfo`; None reads it. A machine without that file keeps what was given.
    """
    if given != "auto" or not is_cpu:
        return given
    try:
        found = _CPU_INFO.read_text() if cpu_info is None else cpu_info
    except OSError:
        return given
    return given if computes_in_bfloat16(found) else "float32"
