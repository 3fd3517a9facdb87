"""Preference losses, reward models and merging: closed forms by hand, data in the published schemas, whole small runs."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from lnjax.learn.preference import bradley_terry_loss, preference_loss, regression_loss, rpo_distance
from lnjax.schema import OptimizerConfig, PackConfig, PreferenceConfig, PreferenceDataConfig
from lnjax.types import PackedBatch, PreferenceBatch


def close(a, b, tol=1e-6):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tol, atol=tol)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def preference(loss="dpo", *, beta=0.5, eta=1.0):
    return PreferenceConfig(
        data=PreferenceDataConfig(source="arithmetic"), loss=loss, beta=beta, eta=eta, steps=1, batch_size=1,
        pack=PackConfig(row_tokens=8, microbatch_rows=1), optimizer=OptimizerConfig(learning_rate=1e-3),
    )  # fmt: skip


def batch(*, answers, ref, scores, real=(1.0, 0.0)):
    """One row of two comparisons, the second of them empty unless `real` says so."""
    zeros = jnp.zeros((1, len(answers)), jnp.int32)
    mask = jnp.asarray([[float(a > 0) for a in answers]])
    scores = jnp.asarray([scores], jnp.float32)
    return PreferenceBatch(
        packed=PackedBatch(zeros, zeros, zeros, mask),
        answer_BT=jnp.asarray([answers], jnp.int32),
        last_BPK=jnp.zeros(scores.shape[:3], jnp.int32),
        scores_BPKA=scores,
        real_BP=jnp.asarray([real], jnp.float32),
        ref_logprobs_BT=jnp.asarray([ref], jnp.float32),
    )


LOGPROBS = jnp.asarray([[0.0, -1.0, -2.0, -3.0, -4.0]])
PAIR = batch(answers=[0, 1, 1, 2, 2], ref=[9.0, -1.5, -2.5, -2.0, -4.5], scores=[[[3.0], [1.0]], [[7.0], [0.0]]])
"""Log ratios: 0.5 + 0.5 = 1 for the better answer, -1 + 0.5 = -0.5 for the worse. With beta 0.5 the gap is 0.75."""


def test_dpo_is_minus_log_sigmoid_of_the_implicit_gap_and_leaves_empty_places_out():
    out = preference_loss(LOGPROBS, PAIR, c=preference())
    close(out.total, -math.log(sigmoid(0.75)))
    close(out.count, 1.0)
    close([out.metrics[k] for k in ("tokens", "accuracy", "margin", "best")], [1.0, 1.0, 0.75, 0.5])


def test_dpo_of_the_reference_itself_is_ln_2():
    same = preference_loss(PAIR.ref_logprobs_BT, PAIR, c=preference())
    close(same.total, math.log(2))


def test_the_three_distances_of_rpo_for_a_pair():
    # eta 0.25 makes of the rewards 3 and 1 a gap of 0.5
    p, q = sigmoid(0.75), sigmoid(0.5)
    expected = {
        "rpo_squared": (0.75 - 0.5) ** 2,
        "rpo_forward_kl": p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)),
        "rpo_backward_kl": q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p)),
    }
    for kind, value in expected.items():
        close(preference_loss(LOGPROBS, PAIR, c=preference(kind, eta=0.25)).total, value)


@pytest.mark.parametrize("kind", ["rpo_squared", "rpo_forward_kl", "rpo_backward_kl"])
def test_rpo_vanishes_where_the_gaps_agree_whatever_the_level(kind):
    implicit = jnp.asarray([[[1.0, 0.0, -2.0]]])
    close(rpo_distance(implicit, implicit + 5.0, kind=kind), [[0.0]])


def test_rpo_of_three_answers():
    implicit, rewards = jnp.asarray([[[1.0, 0.0, 0.0]]]), jnp.asarray([[[0.0, 0.0, 2.0]]])
    close(rpo_distance(implicit, rewards, kind="rpo_squared"), [[(1 + 9 + 4) / 3]])  # gaps 1-0, 1+2, 0+2
    e = math.e
    p, q = np.array([e, 1, 1]) / (e + 2), np.array([1, 1, e * e]) / (2 + e * e)
    close(rpo_distance(implicit, rewards, kind="rpo_forward_kl"), [[(p * np.log(p / q)).sum()]])
    close(rpo_distance(implicit, rewards, kind="rpo_backward_kl"), [[(q * np.log(q / p)).sum()]])


def test_bradley_terry_and_regression_losses():
    scores = jnp.asarray([[[[2.0], [0.5]], [[9.0], [9.0]]]])
    out = bradley_terry_loss(scores, PAIR)
    close([out.total, out.count], [-math.log(sigmoid(1.5)), 1.0])
    rated = batch(answers=[0, 1, 2], ref=[0, 0, 0], scores=[[[4.0, 2.0]], [[1.0, 1.0]]], real=(1.0, 1.0))
    out = regression_loss(jnp.asarray([[[[3.0, 4.0]], [[1.0, 0.0]]]]), rated)
    close([out.total, out.count], [(1 + 4) / 2 + (0 + 1) / 2, 2.0])
