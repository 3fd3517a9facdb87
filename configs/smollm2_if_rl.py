"""smollm2_if_grpo over all 25 kinds of IFEval instructions, 1 to 10 of them in a prompt, by RLOO: the published stage, small.

Published (arXiv 2505.00949, section 6): RLOO, synthetic prompts of 1 to 10 instructions, fewer than 120 steps. The reward is the
share of a prompt's instructions that are followed, strictly. Sizes are chosen.
"""

import dataclasses

from configs import smollm2_if_grpo
from lnjax.schema import AdvantageConfig, EmbeddedConfig, PackConfig, RunConfig, SamplingConfig


def config() -> RunConfig:
    base = smollm2_if_grpo.config()
    assert base.grpo and base.eval and isinstance(base.engine, EmbeddedConfig)
    sampling = SamplingConfig(max_new_tokens=96)
    kinds = {"source": "ifeval_combined", "max_prompt_tokens": 160}
    return dataclasses.replace(
        base,
        name="smollm2_if_rl",
        engine=dataclasses.replace(base.engine, num_slots=64, max_len=256),
        grpo=dataclasses.replace(
            base.grpo,
            prompts=dataclasses.replace(base.grpo.prompts, **kinds),
            sampling=sampling,
            advantage=AdvantageConfig(baseline="leave_one_out", normalize_std=False),
            steps=24,
            optimizer=dataclasses.replace(base.grpo.optimizer, learning_rate=2e-5),
            pack=PackConfig(row_tokens=1024, microbatch_rows=2),  # a prompt and its eight completions
        ),
        eval=dataclasses.replace(
            base.eval,
            num_samples=1,
            prompts=dataclasses.replace(base.eval.prompts, **kinds, num_prompts=200),
            sampling=sampling,
        ),
    )
