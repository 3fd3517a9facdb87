"""Two layers, twenty GRPO steps, samples from a real vLLM server that gets every new policy. Minutes. For tests."""

import dataclasses

from configs import tiny_grpo
from lnjax.schema import ModelSpec, RunConfig, VllmConfig, uniform_blocks


def config() -> RunConfig:
    tiny = tiny_grpo.config()
    assert tiny.grpo and tiny.model.spec
    spec = ModelSpec(
        vocab_size=128,
        d_model=64,
        num_heads=4,
        head_dim=32,  # vLLM's CPU attention takes no smaller one
        blocks=uniform_blocks(num_layers=2, num_kv_heads=2, ffn=128),
        num_source_layers=2,
        tied_embeddings=True,
        max_position=256,
        bos_token_id=1,
        eos_token_ids=(2, 5),
    )
    return dataclasses.replace(
        tiny,
        name="tiny_grpo_vllm",
        model=dataclasses.replace(tiny.model, spec=spec),
        engine=VllmConfig(max_len=256, dtype="float32", parity_limit=1.001),
        sft=None,
        grpo=dataclasses.replace(tiny.grpo, steps=20, updates_per_step=1),
        eval=None,
    )
