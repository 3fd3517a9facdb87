"""A small model learns when to use a calculator: SFT on lessons with and without calls, then GRPO over several turns.

Numbers are chosen here, for minutes on two CPU cores. `--environment.kind none` measures and trains it without an answer to its
calls.
"""

from lnjax.schema import (
    CheckpointConfig,
    EmbeddedConfig,
    EnvironmentConfig,
    EvalConfig,
    GrpoConfig,
    ModelConfig,
    ModelSpec,
    OptimizerConfig,
    PackConfig,
    PromptConfig,
    RewardConfig,
    RunConfig,
    SamplingConfig,
    SftConfig,
    SftDataConfig,
    uniform_blocks,
)


def config() -> RunConfig:
    problems = "python:configs._tools:problems"
    return RunConfig(
        name="tiny_tools",
        model=ModelConfig(
            source="random",
            spec=ModelSpec(
                vocab_size=128,
                d_model=128,
                num_heads=4,
                head_dim=32,
                blocks=uniform_blocks(num_layers=3, num_kv_heads=2, ffn=256),
                num_source_layers=3,
                tied_embeddings=True,
                max_position=288,
                bos_token_id=1,
                eos_token_ids=(2, 5),
            ),
            tokenizer="arithmetic",
            compute_dtype="float32",
            remat="none",
        ),
        engine=EmbeddedConfig(
            num_slots=64, max_len=288, decode_chunk=16, prefill_rows=16, prefill_multiple=32, dtype="float32"
        ),
        reward=RewardConfig(num_workers=1),
        environment=EnvironmentConfig(kind="calculator", max_turns=2, max_tokens=256),
        sft=SftConfig(
            data=SftDataConfig(source="python:configs._tools:lessons", num_examples=8000),
            steps=1500,
            batch_rows=8,
            pack=PackConfig(row_tokens=256, microbatch_rows=8),
            optimizer=OptimizerConfig(
                learning_rate=3e-3, schedule="cosine", min_learning_rate=1e-4, warmup_steps=40, weight_decay=0.01
            ),
        ),
        grpo=GrpoConfig(
            prompts=PromptConfig(source=problems, num_prompts=2000, seed=1, max_prompt_tokens=32),
            prompts_per_step=8,
            samples_per_prompt=8,
            steps=40,
            sampling=SamplingConfig(max_new_tokens=96),
            pack=PackConfig(row_tokens=288, microbatch_rows=16),
            optimizer=OptimizerConfig(learning_rate=1e-4, schedule="cosine", min_learning_rate=1e-5, warmup_steps=2),
        ),
        eval=EvalConfig(
            prompts=PromptConfig(source=problems, split="heldout", num_prompts=200, max_prompt_tokens=32),
            sampling=SamplingConfig(max_new_tokens=96),
        ),
        checkpoint=CheckpointConfig(every=100, keep=2),
    )
