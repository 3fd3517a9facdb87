"""tiny_grpo_vllm with sampling and updating at the same time, two steps apart at most. Minutes. For tests."""

import dataclasses

from configs import tiny_grpo_vllm
from lnjax.schema import RunConfig


def config() -> RunConfig:
    tiny = tiny_grpo_vllm.config()
    assert tiny.grpo
    return dataclasses.replace(
        tiny,
        name="tiny_grpo_async",
        engine=dataclasses.replace(tiny.engine, num_servers=2),
        grpo=dataclasses.replace(tiny.grpo, max_staleness=2),
    )
