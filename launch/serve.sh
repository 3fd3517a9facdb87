#!/usr/bin/env bash
# Start one vLLM rollout server of a config's fleet, by hand or from a job script; builds the rollout environment if need be.
#   LNJAX_SERVER_KEY=secret bash launch/serve.sh --config tiny_grpo_vllm --engine.publish-dir /shared/weights --port 8101
# Then attach the learner: LNJAX_SERVER_KEY=secret python -m lnjax.launch --config tiny_grpo_vllm
#   --engine.publish-dir /shared/weights --engine.num-servers 0 --engine.addresses http://127.0.0.1:8101
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/rollout_env.sh
command -v uv >/dev/null || python3 -m pip install --quiet uv
exec uv run python -m lnjax.serve "$@"
