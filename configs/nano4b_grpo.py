"""nano8b_grpo for Nemotron-Nano-4B-v1.1, with fewer samples. No RL numbers are published for it; what differs is chosen."""

import dataclasses

from configs import nano8b_grpo
from lnjax.models.family import family
from lnjax.schema import ModelConfig, RunConfig


def config() -> RunConfig:
    larger = nano8b_grpo.config()
    assert larger.grpo
    return dataclasses.replace(
        larger,
        name="nano4b_grpo",
        model=ModelConfig(source="checkpoints/Llama-3.1-Nemotron-Nano-4B-v1.1", spec=family("nano4b")),
        grpo=dataclasses.replace(larger.grpo, samples_per_prompt=16),  # chosen: the published 16 of Ultra
    )
