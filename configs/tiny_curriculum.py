"""The GRPO stage of tiny_recipe by itself, to compare orders of prompts: run tiny_recipe first, then this with several seeds,
with and without `--grpo.curriculum.order random`. Only the seed of the order and of the samples changes."""

from dataclasses import replace

from configs import tiny_recipe
from lnjax.schema import EvalConfig, PromptConfig, RunConfig, SamplingConfig

FOLDER = "runs/tiny_recipe"


def config() -> RunConfig:
    stage = next(s.run for s in tiny_recipe.config().stages if s.run.name == "grpo")
    assert stage.grpo
    held_out = PromptConfig(
        source=tiny_recipe.LESSONS + "math", split="heldout", num_prompts=512, seed=2, max_prompt_tokens=32
    )
    return replace(
        stage,
        name="tiny_curriculum",
        model=replace(stage.model, source=f"{FOLDER}/sft"),
        grpo=replace(stage.grpo, prompts=replace(stage.grpo.prompts, source=f"{FOLDER}/pass_rates/pass_rates.jsonl")),
        eval=EvalConfig(prompts=held_out, sampling=SamplingConfig(max_new_tokens=32, temperature=0.6, top_p=0.95)),
    )
