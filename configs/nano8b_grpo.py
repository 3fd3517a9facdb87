"""Reasoning GRPO on Nemotron-Nano-8B on one node of 8 H100s: 4 learn, 4 sample.

The report (arXiv 2505.00949) ran reasoning RL on Ultra only. The numbers here are those of NeMo-Aligner's example script
for an 8B model (branch llama-nemotron-dev, "example"), its defaults (gpt_grpo.yaml, "defaults"), or chosen. The learner sees
only its own GPUs: `CUDA_VISIBLE_DEVICES=0,1,2,3 python -m lnjax.launch --config nano8b_grpo`.
"""

from lnjax.models.family import family
from lnjax.schema import (
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
        name="nano8b_grpo",
        model=ModelConfig(source="checkpoints/Llama-3.1-Nemotron-Nano-8B-v1", spec=family("nano8b")),
        mesh=MeshConfig(fsdp=4),  # chosen: half a node
        engine=VllmConfig(num_servers=4, gpus=(4, 5, 6, 7), max_len=8_192),  # chosen: the other half
        reward=RewardConfig(num_workers=8, format="think"),  # chosen; report 5.1
        grpo=GrpoConfig(
            prompts=PromptConfig(source="data/RL/math.jsonl", max_prompt_tokens=1_024),  # chosen
            prompts_per_step=32,  # example
            samples_per_prompt=64,  # example: 2,048 rollouts, one update
            steps=500,  # chosen: as far as Ultra's figure 5 goes
            sampling=SamplingConfig(max_new_tokens=7_168),  # T 1, top-p 1 (defaults); length chosen
            loss=GrpoLossConfig(kl_coef=0.001, aggregation="sequence_mean"),  # example; as NeMo-Aligner averages
            pack=PackConfig(row_tokens=16_384, microbatch_rows=4),  # chosen: one row a GPU
            optimizer=OptimizerConfig(learning_rate=3e-7, warmup_steps=10, b2=0.98, weight_decay=0.1),  # example
        ),
        checkpoint=CheckpointConfig(every=10, keep=2),  # chosen
    )
