"""The judge's protocol against a real model behind a real OpenAI-compatible server."""

import pytest

from lnjax.convert import main as convert
from lnjax.errors import RolloutError
from lnjax.rewards.judge import JudgeClient, Question
from lnjax.rewards.pool import build_reward
from lnjax.schema import JudgeConfig, RewardConfig
from tests import fleet
from tests.test_judge import HOSTILE
from tests.test_vllm import SMOLLM2

pytestmark = pytest.mark.slow
DEADLINE_S = 240.0


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """Address of SmolLM2-135M-Instruct, served with its chat template as `judge`."""
    fleet.build_environment()
    folder = tmp_path_factory.mktemp("judge")
    assert convert(["gguf", SMOLLM2, str(folder / "model"), "--dtype", "float32"]) == 0
    with fleet.serving(folder / "model", "--max-model-len", "4096", "--max-num-seqs", "16") as address:
        yield address


def config(address, **changes):
    return JudgeConfig(
        **{"address": address, "model": "judge", "deadline_s": DEADLINE_S, "concurrency": 8, "retries": 0, **changes}
    )


def test_a_small_model_gives_a_verdict_or_is_said_to_give_none_and_is_asked_once(judge):
    client = JudgeClient(config(judge))
    asked = [
        Question("What is the capital of France?", "Paris", f"{x}")
        for x in ("Paris", "Rome", "Oslo", *HOSTILE.values())
    ]
    first = client.ask(asked)
    for verdict in first:  # of a model this small: any, but never an error of the protocol
        assert verdict.failure == "" or verdict.failure.startswith("judge: neither YES nor NO in "), verdict
    certain = [v for v in first if not v.failure]
    assert certain or any("Paris" in v.failure for v in first), first  # a model of words, if not of verdicts
    again = client.ask(asked)
    assert [v.right for v in again] == [v.right for v in first]
    assert client.counts["remembered"] == len(certain)
    assert client.counts["asked"] == 2 * len(asked) - len(certain)


def test_a_wrong_model_name_is_known_before_anything_is_sampled(judge):
    reward = RewardConfig(num_workers=1, judge=config(judge, model="another"))
    with (
        build_reward(reward) as pool,
        pytest.raises(RolloutError, match=r"refused with status 404.*reward\.judge\.model"),
    ):
        pool.start()
