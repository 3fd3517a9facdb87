"""Two layers, ten SFT and ten GRPO steps, two updates a cycle, a reference policy: seconds. For tests.

The RL task is one where babble is right at times (no commas, few words), so that there is something to learn from.
"""

from lnjax.schema import (
    CheckpointConfig,
    EmbeddedConfig,
    EvalConfig,
    GrpoConfig,
    GrpoLossConfig,
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
        name="tiny_grpo",
        model=ModelConfig(
            source="random",
            spec=ModelSpec(
                vocab_size=128,
                d_model=32,
                num_heads=4,
                head_dim=16,
                blocks=uniform_blocks(num_layers=2, num_kv_heads=2, ffn=64),
                num_source_layers=2,
                tied_embeddings=True,
                max_position=128,
                bos_token_id=1,
                eos_token_ids=(2, 5),
            ),
            tokenizer="arithmetic",
            compute_dtype="float32",
        ),
        engine=EmbeddedConfig(
            num_slots=16, max_len=256, decode_chunk=8, prefill_rows=8, prefill_multiple=32, dtype="float32"
        ),
        reward=RewardConfig(num_workers=1, format="think"),
        sft=SftConfig(
            data=SftDataConfig(source="arithmetic", num_examples=500),
            steps=10,
            batch_rows=8,
            pack=PackConfig(row_tokens=128, microbatch_rows=8),
            optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        ),
        grpo=GrpoConfig(
            prompts=PromptConfig(source="ifeval", num_prompts=200, max_prompt_tokens=200),
            prompts_per_step=8,
            samples_per_prompt=4,
            steps=10,
            updates_per_step=2,
            sampling=SamplingConfig(max_new_tokens=24),
            loss=GrpoLossConfig(kl_coef=0.001, clip_high=0.28, importance_cap=2.0),
            pack=PackConfig(row_tokens=256, microbatch_rows=8),
            optimizer=OptimizerConfig(learning_rate=3e-3),
        ),
        eval=EvalConfig(
            prompts=PromptConfig(source="ifeval", split="heldout", num_prompts=32, max_prompt_tokens=200),
            sampling=SamplingConfig(max_new_tokens=24),
        ),
        checkpoint=CheckpointConfig(every=4, keep=2),
    )
