"""A small model learns when to use a calculator: SFT on lessons with and without calls, then GRPO over several turns.

Numbers are chosen here, for minutes on two CPU cores. `--environment.kind none` measures and trains it without an answer to its
calls.
"""

from dataclasses import replace

from configs import quickstart
from lnjax.schema import (
    EmbeddedConfig,
    EnvironmentConfig,
    EvalConfig,
    PackConfig,
    PromptConfig,
    RewardConfig,
    RunConfig,
    SamplingConfig,
    SftDataConfig,
    uniform_blocks,
)

PROBLEMS = "python:configs._tools:problems"


def config() -> RunConfig:
    base = quickstart.config()
    assert base.model.spec and base.sft and base.grpo and isinstance(base.engine, EmbeddedConfig)
    blocks = uniform_blocks(num_layers=3, num_kv_heads=2, ffn=256)
    spec = replace(base.model.spec, blocks=blocks, num_source_layers=3, max_position=288)
    sampling = SamplingConfig(max_new_tokens=96)
    return replace(
        base,
        name="tiny_tools",
        model=replace(base.model, spec=spec),
        engine=replace(base.engine, num_slots=64, max_len=288, decode_chunk=16),
        reward=RewardConfig(num_workers=1),
        environment=EnvironmentConfig(kind="calculator", max_turns=2, max_tokens=256),
        sft=replace(
            base.sft,
            data=SftDataConfig(source="python:configs._tools:lessons", num_examples=8000),
            steps=1500,
            batch_rows=8,
            pack=PackConfig(row_tokens=256, microbatch_rows=8),
            optimizer=replace(base.sft.optimizer, learning_rate=3e-3, warmup_steps=40),
        ),
        grpo=replace(
            base.grpo,
            prompts=PromptConfig(source=PROBLEMS, num_prompts=2000, seed=1, max_prompt_tokens=32),
            prompts_per_step=8,
            samples_per_prompt=8,
            steps=40,
            sampling=sampling,
            pack=PackConfig(row_tokens=288, microbatch_rows=16),
            optimizer=replace(base.grpo.optimizer, warmup_steps=2),
        ),
        eval=EvalConfig(
            prompts=PromptConfig(source=PROBLEMS, split="heldout", num_prompts=200, max_prompt_tokens=32),
            sampling=sampling,
        ),
        checkpoint=replace(base.checkpoint, every=100),
    )
