"""Runs in the rollout environment: a random Llama in Hugging Face format. Usage: make_llama.py OUT JSON"""

import json
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

out, text = sys.argv[1:]
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(**json.loads(text))).to(torch.bfloat16)
for name, value in model.named_parameters():
    value.data = torch.randn(value.shape).to(torch.bfloat16) * (0.1 if value.ndim > 1 else 0.2) + (value.ndim == 1)
model.save_pretrained(out)
