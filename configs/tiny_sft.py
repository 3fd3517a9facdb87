"""Two layers, ten SFT steps: seconds. For tests."""

from configs import tiny_grpo
from lnjax.schema import RunConfig


def config() -> RunConfig:
    tiny = tiny_grpo.config()
    return RunConfig(name="tiny_sft", model=tiny.model, engine=tiny.engine, sft=tiny.sft, checkpoint=tiny.checkpoint)
