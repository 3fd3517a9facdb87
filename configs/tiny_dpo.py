"""The tiny model: 300 SFT steps, then 60 of DPO on generated pairs (the bare right number against a wrong one or a sentence).

About a minute on two CPU cores. Every number is chosen. The published pipeline prefers RPO (tiny_rpo).
"""

import dataclasses

from configs import quickstart
from lnjax.schema import OptimizerConfig, PackConfig, PreferenceConfig, PreferenceDataConfig, RunConfig, uniform_blocks


def config() -> RunConfig:
    base = quickstart.config()
    assert base.sft and base.eval and base.model.spec
    spec = dataclasses.replace(
        base.model.spec, d_model=64, blocks=uniform_blocks(num_layers=2, num_kv_heads=2, ffn=192), num_source_layers=2
    )
    return dataclasses.replace(
        base,
        name="tiny_dpo",
        model=dataclasses.replace(base.model, spec=spec),
        sft=dataclasses.replace(base.sft, steps=300),
        preference=PreferenceConfig(
            data=PreferenceDataConfig(source="arithmetic", num_comparisons=4000, seed=1),
            loss="dpo",
            beta=0.1,
            steps=60,
            batch_size=32,
            pack=PackConfig(row_tokens=128, microbatch_rows=16, max_segments=8),
            optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=5),
        ),
        grpo=None,
        checkpoint=dataclasses.replace(base.checkpoint, every=100),
    )
