"""nano8b_sft for Nemotron-Nano-4B-v1.1: no training numbers are published for it, so the 8B model's are taken."""

import dataclasses

from configs import nano8b_sft
from lnjax.models.family import family
from lnjax.schema import ModelConfig, RunConfig


def config() -> RunConfig:
    model = ModelConfig(source="checkpoints/Llama-3.1-Nemotron-Nano-4B-v1.1", spec=family("nano4b"))
    return dataclasses.replace(nano8b_sft.config(), name="nano4b_sft", model=model)
