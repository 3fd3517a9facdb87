"""Runs in the rollout environment: {parameter: shape} of vLLM's own DeciLM class for a folder's config.json.

Usage: decilm_names.py FOLDER OUT.json
"""

import json
import socket
import sys
from pathlib import Path

import lnjax_vllm
import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models.nemotron_nas import DeciLMForCausalLM

folder, out = sys.argv[1:]
lnjax_vllm.register()
config = EngineArgs(model=folder, skip_tokenizer_init=True, load_format="dummy", max_model_len=256).create_engine_config()
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
with set_current_vllm_config(config):
    init_distributed_environment(1, 0, f"tcp://127.0.0.1:{port}", 0, "gloo")
    ensure_model_parallel_initialized(1, 1)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = DeciLMForCausalLM(vllm_config=config)
shapes = {name: list(p.shape) for name, p in model.named_parameters()}
Path(out).write_text(json.dumps(shapes))
