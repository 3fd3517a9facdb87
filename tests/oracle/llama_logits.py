"""Runs in the rollout environment: logits of transformers on given tokens. Usage: llama_logits.py SOURCE TOKENS.npy OUT.npy

SOURCE is a folder in Hugging Face format or FOLDER/FILE.gguf.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

source, tokens, out = sys.argv[1:]
torch.manual_seed(0)
path = Path(source)
where = {"pretrained_model_name_or_path": str(path)}
if path.suffix == ".gguf":
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, attn_implementation="eager").eval()
with torch.no_grad():
    logits = model(torch.from_numpy(np.load(tokens)).long()).logits
np.save(out, logits.numpy())
