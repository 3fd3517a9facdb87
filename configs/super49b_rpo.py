"""Online RPO of Nemotron-Super-49B, the chat stage: one of the two iterations that the report (arXiv 2505.00949, section 6) ran.

The second iteration is this config again with the first one's run as --model.source. The distance, answers a prompt and lengths
are not published. The report's judge is a 70B reward model; `reward.model` takes one trained by lnjax (configs with a
`reward_model` stage). 8 learner nodes and 2 rollout nodes of 8 H100s.
"""

import dataclasses

from configs import super49b_grpo
from lnjax.schema import (
    OnlineConfig,
    OptimizerConfig,
    PackConfig,
    PreferenceConfig,
    PromptConfig,
    RewardConfig,
    RunConfig,
    SamplingConfig,
    ScorerConfig,
)


def config() -> RunConfig:
    base = super49b_grpo.config()
    pack = PackConfig(row_tokens=16_384, microbatch_rows=8)  # chosen: one row a shard
    scorer = ScorerConfig(source="runs/super49b_reward_model", pack=pack)  # yours
    prompts = PromptConfig(
        source="data/RL/chat/helpsteer2_prompts.jsonl",  # report 6: prompts of HelpSteer2
        verifier="reward_model",
        max_prompt_tokens=2_048,  # chosen
    )
    return dataclasses.replace(
        base,
        name="super49b_rpo",
        reward=RewardConfig(num_workers=4, model=scorer),
        grpo=None,
        preference=PreferenceConfig(
            # Chosen: 4 answers of up to 3,072 tokens, which a row holds behind their prompt.
            data=OnlineConfig(prompts=prompts, samples_per_prompt=4, sampling=SamplingConfig(max_new_tokens=3_072)),
            loss="rpo_backward_kl",  # chosen
            beta=1e-5,  # report 6: KL weight
            eta=3.0,  # report 6: reward scale
            steps=500,  # report 6, each iteration
            batch_size=64,  # report 6
            pack=pack,
            optimizer=OptimizerConfig(
                learning_rate=4e-7,  # report 6
                warmup_steps=10,  # NeMo-Aligner's defaults from here on
                b2=0.98,
                weight_decay=0.1,
            ),
        ),
    )
