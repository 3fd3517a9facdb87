"""Instruction-following RL on Nemotron-Super-49B: the RLOO stage that the report (arXiv 2505.00949, section 6) ran on Super.

Its learning rate, KL weight and samples per prompt are not published; Ultra's RLHF stage (section 6) lends the first two.
8 learner nodes and 2 rollout nodes of 8 H100s.
"""

from lnjax.models.family import family
from lnjax.schema import (
    AdvantageConfig,
    CheckpointConfig,
    GrpoConfig,
    GrpoLossConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PackConfig,
    PromptConfig,
    RewardConfig,
    RunConfig,
    SamplingConfig,
    VllmConfig,
)


def config() -> RunConfig:
    return RunConfig(
        name="super49b_grpo",
        model=ModelConfig(source="checkpoints/Llama-3_3-Nemotron-Super-49B-v1", spec=family("super49b")),
        mesh=MeshConfig(fsdp=8, tensor=8),  # chosen, as for SFT
        # Chosen: BF16 weights take 25 of 80 GB a GPU at tensor parallel 4. A cluster job starts the servers on their own
        # nodes and passes their addresses.
        engine=VllmConfig(num_servers=4, tensor_parallel=4, max_len=8_192),
        reward=RewardConfig(num_workers=16),  # chosen; the answer after </think> is judged, tags are not
        grpo=GrpoConfig(
            prompts=PromptConfig(  # report 6: synthetic prompts with 1 to 10 instructions
                source="data/RL/instruction_following/instruction_following.jsonl",
                max_prompt_tokens=2_048,  # chosen
            ),
            prompts_per_step=128,  # report 6
            samples_per_prompt=8,  # chosen: as in Ultra's RLHF
            steps=120,  # report 6: fewer than 120
            sampling=SamplingConfig(max_new_tokens=6_144),  # chosen
            advantage=AdvantageConfig(normalize_std=False),  # report 6: RLOO
            loss=GrpoLossConfig(kl_coef=0.001, aggregation="sequence_mean"),  # Ultra's RLHF; as NeMo-Aligner averages
            pack=PackConfig(row_tokens=16_384, microbatch_rows=8),  # chosen: one row a shard
            optimizer=OptimizerConfig(
                learning_rate=3e-7,  # Ultra's RLHF
                warmup_steps=10,  # NeMo-Aligner's defaults from here on
                b2=0.98,
                weight_decay=0.1,
            ),
        ),
        checkpoint=CheckpointConfig(every=10, keep=2),  # chosen
    )
