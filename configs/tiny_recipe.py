"""The published pipeline with a tiny model on two CPU cores: SFT with the reasoning switch, pass rates, GRPO in a curriculum with
a judge, RL on instructions, a reward model, online RPO on chat with it, and every policy measured on the same held-out prompts.

Published (arXiv 2505.00949): the order (sections 4 to 6), 8 answers a prompt for pass rates and those of 0.75 and more left
out (5.1), reward accuracy x format (5.1), RLOO for instructions (6.1), temperature 0.6 and top-p 0.95 with reasoning on and
greedy with it off (7). Every number below is chosen, for minutes on two cores.
"""

from dataclasses import replace

from configs import quickstart
from lnjax.recipe import RecipeConfig, RecipeEvalConfig, RecipeStage
from lnjax.schema import (
    AdvantageConfig,
    CheckpointConfig,
    CurriculumConfig,
    EmbeddedConfig,
    GrpoConfig,
    JudgeConfig,
    OnlineConfig,
    OptimizerConfig,
    PackConfig,
    PreferenceConfig,
    PreferenceDataConfig,
    PromptConfig,
    RecordConfig,
    RewardConfig,
    RewardModelConfig,
    RunConfig,
    SamplingConfig,
    ScorerConfig,
    SftConfig,
    SftDataConfig,
)

LESSONS = "python:configs._lessons:"
PROMPT_TOKENS, ANSWER_TOKENS = 88, 80
SCORER = ScorerConfig(source="stage:reward_model", pack=PackConfig(row_tokens=192, microbatch_rows=16))
JUDGE = JudgeConfig(address="rule", rule_first=False, concurrency=4)


def start() -> RunConfig:
    """SFT from random weights."""
    base = quickstart.config()
    assert base.model.spec
    return replace(
        base,
        name="sft",
        engine=EmbeddedConfig(
            num_slots=128, max_len=192, decode_chunk=8, prefill_rows=16, prefill_multiple=32, dtype="float32"
        ),
        reward=RewardConfig(num_workers=1, format="think"),
        sft=SftConfig(
            data=SftDataConfig(source=LESSONS + "school", num_examples=12000),
            steps=900,
            batch_rows=16,
            pack=PackConfig(row_tokens=160, microbatch_rows=16),
            optimizer=OptimizerConfig(
                learning_rate=2e-3, schedule="cosine", min_learning_rate=1e-4, warmup_steps=20, weight_decay=0.01
            ),
        ),
        grpo=None,
        eval=None,
        checkpoint=CheckpointConfig(every=100, keep=1),
        record=RecordConfig(per_doubling=4),
    )


def later(name: str, source: str) -> RunConfig:
    base = start()
    return replace(base, name=name, model=replace(base.model, source=f"stage:{source}", tokenizer="same"), sft=None)


def math_rl() -> GrpoConfig:
    return GrpoConfig(
        prompts=PromptConfig(source=LESSONS + "math", num_prompts=1200, seed=1, max_prompt_tokens=32),
        prompts_per_step=16,
        samples_per_prompt=16,
        steps=60,
        sampling=SamplingConfig(max_new_tokens=32),
        pack=PackConfig(row_tokens=160, microbatch_rows=16),
        optimizer=OptimizerConfig(learning_rate=1e-4, schedule="cosine", min_learning_rate=1e-5, warmup_steps=5),
    )


def lesson_rl(kind: str, *, steps: int) -> GrpoConfig:
    return replace(
        math_rl(),
        prompts=PromptConfig(source=LESSONS + kind, num_prompts=2000, seed=1, max_prompt_tokens=PROMPT_TOKENS),
        steps=steps,
        sampling=SamplingConfig(max_new_tokens=ANSWER_TOKENS),
        pack=PackConfig(row_tokens=256, microbatch_rows=8),
    )


def config() -> RecipeConfig:
    judged = RewardConfig(num_workers=1, format="think", judge=JUDGE)
    pass_rates = replace(later("pass_rates", "sft"), reward=judged, grpo=math_rl())
    rates = replace(math_rl().prompts, source="stage:pass_rates/pass_rates.jsonl", num_prompts=0)
    curriculum = CurriculumConfig(batches=60)
    grpo = replace(later("grpo", "sft"), reward=judged, grpo=replace(math_rl(), prompts=rates, curriculum=curriculum))
    rloo = replace(
        lesson_rl("instructions", steps=60),
        advantage=AdvantageConfig(baseline="leave_one_out", normalize_std=False),
    )
    reward_model = replace(
        later("reward_model", "sft"),
        reward_model=RewardModelConfig(
            data=PreferenceDataConfig(source=LESSONS + "pairs", num_comparisons=4000, seed=1),
            heldout=PreferenceDataConfig(source=LESSONS + "pairs", split="heldout", num_comparisons=256),
            steps=200,
            batch_size=32,
            pack=PackConfig(row_tokens=240, microbatch_rows=16, max_segments=8),
            optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=10),
        ),
        checkpoint=CheckpointConfig(every=100, keep=1, export_hf=False),
    )
    chat = PreferenceConfig(
        data=OnlineConfig(
            prompts=lesson_rl("chat", steps=40).prompts,
            samples_per_prompt=8,
            sampling=SamplingConfig(max_new_tokens=ANSWER_TOKENS),
        ),
        loss="rpo_backward_kl",
        beta=0.1,
        eta=3.0,  # published for Super (6.3)
        steps=40,
        batch_size=16,
        pack=PackConfig(row_tokens=768, microbatch_rows=2),
        optimizer=math_rl().optimizer,
    )
    scored = RewardConfig(num_workers=1, format="think", model=SCORER)
    held_out = PromptConfig(
        source=LESSONS + "math", split="heldout", num_prompts=512, seed=2, max_prompt_tokens=PROMPT_TOKENS
    )
    return RecipeConfig(
        name="tiny_recipe",
        stages=(
            RecipeStage(run=start()),
            RecipeStage(run=pass_rates, does="pass_rates"),
            RecipeStage(run=grpo),
            RecipeStage(run=replace(later("if_rl", "grpo"), grpo=rloo)),
            RecipeStage(run=reward_model),
            RecipeStage(run=replace(later("chat_rl", "if_rl"), reward=scored, preference=chat)),
        ),
        eval=RecipeEvalConfig(
            math=held_out,
            instructions=replace(held_out, source=LESSONS + "instructions"),
            chat=replace(held_out, source=LESSONS + "chat", num_prompts=400),
            on=SamplingConfig(max_new_tokens=ANSWER_TOKENS, temperature=0.6, top_p=0.95),
            off=SamplingConfig(max_new_tokens=ANSWER_TOKENS, temperature=0.0),
            reward=replace(scored, judge=JUDGE),
        ),
    )
