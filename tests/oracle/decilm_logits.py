"""Runs in the rollout environment: a plain torch DeciLM, written from the published block rules, on a folder's weights.

Usage: decilm_logits.py FOLDER TOKENS.npy OUT.npy
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

folder, tokens, out = sys.argv[1:]
config = json.loads((Path(folder) / "config.json").read_text())
weights = {k: v.float() for k, v in load_file(str(Path(folder) / "model.safetensors")).items()}
heads, head_dim = config["num_attention_heads"], config["head_dim"]


def norm(x, weight):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]) * weight


def frequencies():
    inverse = 1.0 / config["rope_theta"] ** (torch.arange(0, head_dim, 2).float() / head_dim)
    scaling = config["rope_scaling"]
    if not scaling:
        return inverse
    old = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    scaled = []
    for f in inverse.tolist():
        wavelength = 2 * math.pi / f
        if wavelength < old / high:
            scaled.append(f)
        elif wavelength > old / low:
            scaled.append(f / scaling["factor"])
        else:
            smooth = (old / wavelength - low) / (high - low)
            scaled.append((1 - smooth) * f / scaling["factor"] + smooth * f)
    return torch.tensor(scaled)


ids = torch.from_numpy(np.load(tokens)).long()
length = ids.shape[1]
angles = torch.arange(length).float()[:, None] * frequencies()[None]
cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()


def rotate(x):
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


x = weights["model.embed_tokens.weight"][ids]
causal = torch.full((length, length), float("-inf")).triu(1)
for i, block in enumerate(config["block_configs"]):
    name = f"model.layers.{i}."
    if not block["attention"]["no_op"]:
        y = norm(x, weights[name + "input_layernorm.weight"])
        q, k, v = (
            (y @ weights[f"{name}self_attn.{p}_proj.weight"].T).unflatten(-1, (-1, head_dim)).transpose(1, 2) for p in "qkv"
        )
        group = block["attention"]["n_heads_in_group"]
        k, v = rotate(k).repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = rotate(q) @ k.transpose(-1, -2) / math.sqrt(head_dim) + causal
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ weights[name + "self_attn.o_proj.weight"].T
    if not block["ffn"]["no_op"]:
        y = norm(x, weights[name + "post_attention_layernorm.weight"])
        gate, up = (y @ weights[f"{name}mlp.{p}_proj.weight"].T for p in ("gate", "up"))
        x = x + (torch.nn.functional.silu(gate) * up) @ weights[name + "mlp.down_proj.weight"].T
x = norm(x, weights["model.norm.weight"])
head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
np.save(out, (x @ head.T).numpy())
