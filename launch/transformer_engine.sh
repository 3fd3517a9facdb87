#!/usr/bin/env bash
# Transformer Engine for JAX into .venv, beside the CUDA 13 build of JAX (uv sync --extra cuda13). Its JAX part is compiled here,
# C++ alone: 3 minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
version=2.20.2 python=.venv/bin/python
install() { uv pip install --no-config --quiet --python "$python" "$@"; }
folder() { "$python" -c "import importlib, sys; print(list(importlib.import_module(sys.argv[1]).__path__)[0])" "$1"; }

install setuptools wheel packaging pydantic importlib-metadata pybind11 ninja nvidia-nvtx nvidia-curand nvidia-cudnn-frontend
install --no-deps "transformer_engine==$version" "transformer_engine_cu13==$version"
nccl=$(folder nvidia.nccl)/lib
ln -sf libnccl.so.2 "$nccl/libnccl.so" # what the linker looks for
LIBRARY_PATH=$nccl NVTE_BUILD_USE_NVIDIA_WHEELS=1 install --no-build-isolation --no-deps "transformer_engine_jax==$version"
echo "Transformer Engine $version is in $python's environment; start learners with LD_LIBRARY_PATH=$nccl"
