"""smollm2_if_grpo with samples from a real vLLM server: real weights, a new version after every update."""

import dataclasses

from configs import smollm2_if_grpo
from lnjax.schema import RunConfig, VllmConfig


def config() -> RunConfig:
    base = smollm2_if_grpo.config()
    return dataclasses.replace(
        base,
        name="smollm2_if_grpo_vllm",
        engine=VllmConfig(max_len=192, max_sequences=64),
    )
