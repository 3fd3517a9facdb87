"""The order of prompts, slot by slot, and the stream over it."""

import pytest

from lnjax.data.arithmetic import arithmetic_rows, pass_rate
from lnjax.data.curriculum import allocate, curriculum_order, describe_batch, order_prompts
from lnjax.data.rows import to_prompt
from lnjax.data.streams import build_prompt_stream
from lnjax.data.tokenizer import load_tokenizer
from lnjax.errors import ConfigError, DataError
from lnjax.schema import CurriculumConfig, PromptConfig

FIVE = (0.0, 0.25, 0.5, 0.75, 1.0)
EIGHTHS = [k / 8 for k in range(9) for _ in range(10)]
"""Ten prompts of each pass rate that 8 samples can give."""


@pytest.mark.parametrize(
    ("left", "centre", "counts"),
    [
        # e^(-2, -1/2, 0, -1/2, -2) x 8 / 2.48 = .44 1.95 3.22 1.95 .44: floors 0 1 3 1 0, then the largest fractions
        ([9, 9, 9, 9, 9], 0.5, [1, 2, 3, 2, 0]),
        ([9, 9, 9, 9, 9], 1.0, [0, 0, 1, 3, 4]),
        ([9, 9, 1, 9, 9], 0.5, [2, 2, 1, 2, 1]),  # two slots go to the bins with the most left
        ([0, 0, 0, 3, 9], 0.0, [0, 0, 0, 1, 7]),  # nothing hard is left: the largest pool fills
        ([2, 2, 2, 2, 0], 1.0, [2, 2, 2, 2, 0]),
    ],
)
def test_slots_follow_the_gaussian_as_far_as_prompts_are_left(left, centre, counts):
    found = allocate(dict(zip(FIVE, left, strict=True)), batch_size=8, centre=centre, sigma=0.25)
    assert [found[rate] for rate in FIVE] == counts


def test_a_narrow_gaussian_between_two_bins_still_has_weights():
    assert allocate(dict.fromkeys(FIVE, 9), batch_size=4, centre=0.4, sigma=1e-3)[0.5] == 4


def test_a_random_order_drops_the_same_prompts_and_goes_nowhere():
    easy_first, hard = CurriculumConfig(), CurriculumConfig(order="random")
    ordered, dropped = curriculum_order(EIGHTHS, batch_size=6, c=easy_first, seed=3)
    batches, same = curriculum_order(EIGHTHS, batch_size=6, c=hard, seed=3)
    assert dropped == same == list(range(60, 90))
    assert sorted(i for b in batches for i in b) == sorted(i for b in ordered for i in b) == list(range(60))
    assert batches == curriculum_order(EIGHTHS, batch_size=6, c=hard, seed=3)[0]
    assert batches != curriculum_order(EIGHTHS, batch_size=6, c=hard, seed=4)[0]

    def slope(found):  # of the mean pass rate, first half to second
        means = [sum(EIGHTHS[i] for i in b) / len(b) for b in found]
        return sum(means[5:]) / 5 - sum(means[:5]) / 5

    assert slope(ordered) < -0.2 < slope(batches) < 0.2
    assert "pass_rate_target" not in describe_batch([0.5], batch=0, num_batches=1, c=hard)


def test_the_batches_of_a_small_pool_are_these():
    rates = [0.0, 0.25, 0.5, 0.75, 1.0, 0.0, 0.25, 0.5, 0.75, 1.0]
    c = CurriculumConfig(drop_at=0.75, start=0.5, end=0.0, sigma=0.05, bins=4)
    batches, dropped = curriculum_order(rates, batch_size=2, c=c, seed=0)
    assert dropped == [3, 4, 8, 9]
    assert [sorted(b) for b in batches] == [[2, 7], [1, 6], [0, 5]]
    again, _ = curriculum_order(rates, batch_size=2, c=c, seed=0)
    assert again == batches


def test_batches_go_from_easy_to_hard_and_use_every_prompt_below_the_limit_once():
    batches, dropped = curriculum_order(EIGHTHS, batch_size=6, c=CurriculumConfig(), seed=3)
    assert [EIGHTHS[i] for i in dropped] == [0.75] * 10 + [0.875] * 10 + [1.0] * 10
    assert sorted(i for b in batches for i in b) == list(range(60))
    # The first, by hand: e^(0, -1/2, -2, -9/2) x 6 / 1.75 = 3.42 2.08 .46 .04 slots for 5/8, 4/8, 3/8, 2/8.
    assert [sorted(int(8 * EIGHTHS[i]) for i in b) for b in batches] == [
        [3, 4, 4, 5, 5, 5],
        [3, 4, 4, 4, 5, 5],
        [3, 3, 4, 4, 4, 5],
        [2, 3, 3, 4, 4, 5],
        [0, 1, 2, 2, 3, 3],
        [0, 1, 2, 2, 3, 3],
        [0, 0, 1, 1, 2, 2],
        [0, 1, 1, 1, 2, 2],
        [0, 0, 1, 1, 1, 2],
        [0, 0, 0, 5, 5, 5],  # what no target wanted comes last
    ]
    other, _ = curriculum_order(EIGHTHS, batch_size=6, c=CurriculumConfig(), seed=4)
    assert other != batches
    assert [sorted(EIGHTHS[i] for i in b) for b in other] == [sorted(EIGHTHS[i] for i in b) for b in batches]


def test_the_batch_is_shuffled_and_a_rest_smaller_than_a_batch_is_left_out():
    batches, _ = curriculum_order(EIGHTHS, batch_size=32, c=CurriculumConfig(), seed=0)
    assert [len(b) for b in batches] == [32]
    assert batches[0] != sorted(batches[0])


def test_the_centre_stays_at_the_end_when_there_are_more_prompts_than_its_batches():
    c = CurriculumConfig(drop_at=0.75, start=0.5, end=0.0, sigma=0.01, bins=8, batches=2)
    batches, _ = curriculum_order(EIGHTHS, batch_size=5, c=c, seed=0)
    assert [[EIGHTHS[i] for i in b] for b in batches[:3]] == [[0.5] * 5, [0.0] * 5, [0.0] * 5]
    assert len(batches) == 12


def prompts(rates):
    row = {"input": "1+1=?", "args": {"verifier": "integer", "answer": "2"}}
    tokenizer = load_tokenizer("arithmetic")
    return [
        to_prompt(row if r is None else row | {"pass_rate": r}, where=f"f:{i}", tokenizer=tokenizer, max_tokens=64)
        for i, r in enumerate(rates)
    ]


def test_a_prompt_without_a_pass_rate_or_with_a_wrong_one_is_named():
    with pytest.raises(DataError, match="f:1: no pass_rate"):
        order_prompts(prompts([0.5, None]), batch_size=1, c=CurriculumConfig(), seed=0)
    for wrong in (1.5, "half", -0.1):
        with pytest.raises(DataError, match="f:0: pass_rate="):
            prompts([wrong])
    with pytest.raises(ConfigError, match=r"1 of 2 prompts are below drop_at=0\.75, fewer than"):
        order_prompts(prompts([0.5, 0.75]), batch_size=2, c=CurriculumConfig(), seed=0)


def test_a_batch_is_described_by_target_mean_and_shares():
    c = CurriculumConfig(start=0.5, end=0.0, bins=4)
    assert describe_batch([0.0, 0.25, 0.25, 0.7], batch=1, num_batches=3, c=c) == {
        "pass_rate_target": 0.25,
        "pass_rate": 0.3,
        "pass_rate/0": 0.25,
        "pass_rate/0.25": 0.5,
        "pass_rate/0.75": 0.25,
    }
    again = describe_batch([0.0], batch=3, num_batches=3, c=c)  # the order begins again
    assert again["pass_rate_target"] == 0.5


def test_a_stream_over_a_curriculum_goes_on_from_its_cursor_and_begins_again_at_its_end():
    tokenizer = load_tokenizer("arithmetic")
    source = PromptConfig(source="arithmetic", num_prompts=120)

    def stream():
        return build_prompt_stream(source, tokenizer, curriculum=CurriculumConfig(), batch_size=8)

    whole, resumed = stream(), stream()
    first, second = whole.take(24), whole.take(8)
    resumed.take(24)
    cursor = resumed.cursor
    other = stream()
    other.seek(cursor)
    assert other.take(8) == second
    assert whole.prompts[:24] == first
    other.seek({"next": len(whole.prompts)})
    assert other.take(8) == first[:8]
    rates = [p.pass_rate for p in whole.prompts]
    assert max(rates) == 0.625 and sum(rates[:8]) > sum(rates[-8:])


def test_generated_arithmetic_has_a_difficulty():
    rates = {p: pass_rate(p) for p in ("11+22", "18+22", "77+44", "58-21", "52-38", "52-48")}
    assert rates == {"11+22": 0.875, "18+22": 0.625, "77+44": 0.375, "58-21": 0.625, "52-38": 0.375, "52-48": 0.125}
    assert {r["pass_rate"] for r in arithmetic_rows(num_rows=300, seed=0, split="train")} == {
        0.875,
        0.625,
        0.375,
        0.125,
    }
