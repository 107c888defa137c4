"""Which number format `dtype: auto` means where there is no GPU."""

from __future__ import annotations

import pytest

from serving.engine.precision import choose_dtype

AVX2 = "processor\t: 0\nflags\t\t: fpu avx avx2 fma\n\nprocessor\t: 1\nflags\t\t: fpu avx avx2 fma\n"
AMX = AVX2.replace("fma", "fma avx512f avx512_bf16 amx_bf16 amx_tile")
ZEN4 = AVX2.replace("fma", "fma avx512f avx512_bf16")
GRAVITON3 = "processor\t: 0\nBogoMIPS\t: 2100.00\nFeatures\t: fp asimd i8mm bf16 dgh\n"
GRAVITON2 = GRAVITON3.replace(" bf16", "")


@pytest.mark.parametrize(
    ("given", "is_cpu", "cpu_info", "chosen"),
    [
        ("auto", True, AVX2, "float32"),
        ("auto", True, AVX2.replace("fma", "fma avx512f"), "float32"),
        ("auto", True, AMX, "auto"),
        ("auto", True, ZEN4, "auto"),
        ("auto", True, GRAVITON3, "auto"),
        ("auto", True, GRAVITON2, "float32"),
        ("auto", True, ZEN4 + AVX2, "float32"),
        ("auto", True, "", "float32"),
        ("auto", False, AVX2, "auto"),
        ("bfloat16", True, AVX2, "bfloat16"),
        ("float32", True, AMX, "float32"),
    ],
)
def test_auto_is_bfloat16_only_where_the_processor_has_it(given: str, is_cpu: bool, cpu_info: str, chosen: str) -> None:
    assert choose_dtype(given, is_cpu, cpu_info) == chosen


def test_this_machine_is_asked() -> None:
    assert choose_dtype("auto", True) in ("auto", "float32")
