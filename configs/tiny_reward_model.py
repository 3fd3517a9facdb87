"""The tiny model: 300 SFT steps, then 150 of Bradley-Terry on generated pairs; measured on 256 held-out ones.

About a minute on two CPU cores. Every number is chosen. What the published pipeline used (arXiv 2505.00949, section 6) is
Llama-3.1-Nemotron-70B-Reward, trained elsewhere; HelpSteer2 and HelpSteer3 files go in `--reward-model.data.source`.
"""

import dataclasses

from configs import tiny_dpo
from lnjax.schema import OptimizerConfig, PreferenceDataConfig, RewardModelConfig, RunConfig


def config() -> RunConfig:
    tiny = tiny_dpo.config()
    assert tiny.preference and isinstance(tiny.preference.data, PreferenceDataConfig)
    return dataclasses.replace(
        tiny,
        name="tiny_reward_model",
        preference=None,
        reward_model=RewardModelConfig(
            data=tiny.preference.data,
            heldout=PreferenceDataConfig(source="arithmetic", split="heldout", num_comparisons=256),
            steps=150,
            batch_size=32,
            pack=tiny.preference.pack,
            optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=5),
        ),
        checkpoint=dataclasses.replace(tiny.checkpoint, export_hf=False),
    )
