"""A small Llama from scratch on two CPU cores: SFT on worked arithmetic, then GRPO with format and accuracy rewards.

Half of what SFT imitates answers in a sentence, and the accuracy reward wants the bare number: that is what GRPO teaches.
Every number is chosen here, for a run of a few minutes.
"""

from lnjax.schema import (
    CheckpointConfig,
    EmbeddedConfig,
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
    return RunConfig(
        name="quickstart",
        model=ModelConfig(
            source="random",
            spec=ModelSpec(
                vocab_size=128,
                d_model=128,
                num_heads=4,
                head_dim=32,
                blocks=uniform_blocks(num_layers=4, num_kv_heads=2, ffn=384),
                num_source_layers=4,
                tied_embeddings=True,
                max_position=256,
                bos_token_id=1,
                eos_token_ids=(2, 5),
            ),
            tokenizer="arithmetic",
            compute_dtype="float32",
            remat="none",
        ),
        engine=EmbeddedConfig(
            num_slots=128, max_len=64, decode_chunk=8, prefill_rows=16, prefill_multiple=32, dtype="float32"
        ),
        reward=RewardConfig(num_workers=1, format="think"),
        sft=SftConfig(
            data=SftDataConfig(source="arithmetic", num_examples=8000),
            steps=600,
            batch_rows=16,
            pack=PackConfig(row_tokens=128, microbatch_rows=16),
            optimizer=OptimizerConfig(
                learning_rate=2e-3, schedule="cosine", min_learning_rate=1e-4, warmup_steps=20, weight_decay=0.01
            ),
        ),
        grpo=GrpoConfig(
            prompts=PromptConfig(source="arithmetic", num_prompts=8000, seed=1, max_prompt_tokens=32),
            prompts_per_step=16,
            samples_per_prompt=16,
            steps=60,
            sampling=SamplingConfig(max_new_tokens=32),
            pack=PackConfig(row_tokens=160, microbatch_rows=16),
            optimizer=OptimizerConfig(learning_rate=1e-4, schedule="cosine", min_learning_rate=1e-5, warmup_steps=5),
        ),
        eval=EvalConfig(
            prompts=PromptConfig(source="arithmetic", split="heldout", num_prompts=256, max_prompt_tokens=32),
            num_samples=1,
            sampling=SamplingConfig(max_new_tokens=32, temperature=0.0),
        ),
        checkpoint=CheckpointConfig(every=50, keep=2),
    )
