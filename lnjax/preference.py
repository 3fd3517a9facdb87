"""Learning from judged answers, given or sampled on the way: DPO and RPO of the policy, and reward models. Comparisons packed in
rows, one update a step."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lnjax.build import KEY_STATE, Built, Resources
from lnjax.data.preferences import RATINGS, build_comparisons, pack_comparisons
from lnjax.data.streams import PromptStream, ShuffledStream, build_prompt_stream
from lnjax.health import check_update
from lnjax.learn.loss import LossSum
from lnjax.learn.preference import bradley_terry_loss, preference_loss, regression_loss
from lnjax.learn.update import Updater
from lnjax.mesh import fetch, put_rows
from lnjax.models.decoder import Model
from lnjax.models.reward import RewardModel
from lnjax.schema import OnlineConfig, PreferenceConfig, RewardModelConfig
from lnjax.score import describe_groups, mean_interval
from lnjax.source import sample_groups
from lnjax.stage import Position, Stage
from lnjax.types import Comparison, PreferenceBatch, Prompt, RolloutGroup, Sample

Config = PreferenceConfig | RewardModelConfig


def build_stream(b: Built, c: Config) -> ShuffledStream[Comparison] | PromptStream:
    if isinstance(c.data, OnlineConfig):
        return build_prompt_stream(c.data.prompts, b.tokenizer)
    regression = isinstance(c, RewardModelConfig) and c.objective == "regression"
    return build_comparisons(
        c.data, b.tokenizer, regression=regression, max_tokens=c.pack.row_tokens, seed=b.config.seed
    )


def build_heldout(b: Built, c: RewardModelConfig) -> ShuffledStream[Comparison] | None:
    """Pairs to measure a reward model on."""
    if c.heldout is None:
        return None
    return build_comparisons(c.heldout, b.tokenizer, regression=False, max_tokens=c.pack.row_tokens, seed=b.config.seed)


def reward_model(model: Model, c: RewardModelConfig) -> RewardModel:
    return RewardModel(model, len(RATINGS) if c.objective == "regression" else 1)


def build_updater(model: Model, c: Config, *, dtype: Any) -> Updater:
    if isinstance(c, PreferenceConfig):
        abstract = model.abstract_trained(dtype=dtype)

        def loss(params: Any, batch: PreferenceBatch) -> LossSum:
            return preference_loss(_logprobs(model, params, batch), batch, c=c)
    else:
        judge, objective = reward_model(model, c), c.objective
        abstract = judge.abstract_params(dtype=dtype)

        def loss(params: Any, batch: PreferenceBatch) -> LossSum:
            scores = judge.scores(params, batch.packed, batch.last_BPK)
            return (regression_loss if objective == "regression" else bradley_terry_loss)(scores, batch)

    return Updater(loss, abstract_params=abstract, c=c.optimizer, total_steps=c.steps, by_layer=model.by_layer())


def run(b: Built, r: Resources, c: Config, *, stage: Stage, start: Position) -> Any:
    """Train until `c.steps`; returns the parameters (of a reward model: its own). Continues where `start` says."""
    updater, stream = build_updater(b.model, c, dtype=b.param_dtype), r.streams[stage.name]
    logprobs, reference = jax.jit(partial(_logprobs, b.model)), None
    refers = isinstance(c, PreferenceConfig)
    if not refers:
        stage = dataclasses.replace(stage, model={**stage.model, "num_labels": reward_model(b.model, c).num_scores})
    if start.saved is None:
        params = start.params()
        if refers:
            reference = jax.tree.map(jnp.copy, params)
        else:
            params = reward_model(b.model, c).init_params(params)
        state = updater.init(params, step=start.updates, rng=jax.random.fold_in(b.key, KEY_STATE))
    else:
        abstract = updater.abstract_state()
        tree = stage.restore(start.saved, _tree(abstract, abstract.params if refers else None))
        state, reference = tree["state"], tree.get("reference")
        stream.seek(start.saved["cursor"])
    for step in range(start.step + 1, c.steps + 1):
        stage.begin(step)
        with r.log.phase("data"):
            taken, described = stream.take(c.batch_size), {}
        if isinstance(c.data, OnlineConfig):
            version = start.updates + step - 1
            groups = _answers(b, r, c.data, taken, params=state.params, version=version, seed=step)
            r.record.keep(stage.name, step=step, groups=groups, credit=_above_mean)
            taken, described = [_comparison(group) for group in groups], describe_groups(groups)
        with r.log.phase("pack"):
            batches: list[PreferenceBatch] = put_rows(b.mesh, pack_comparisons(taken, c=c.pack)[0])
        # reference logprobs once a batch, with the weights at the start of the stage
        with r.log.phase("logprobs"):
            if reference is not None:
                batches = [dataclasses.replace(x, ref_logprobs_BT=logprobs(r.frozen | reference, x)) for x in batches]
        with r.log.phase("update"):
            state, stats = updater.update(state, batches, r.frozen)
            values = {k: float(v) for k, v in jax.device_get(stats).items()} | described
        values["comparisons"] = values.pop("tokens")
        values["update_tokens"] = sum(len(s.token_ids) for x in taken for s in x.samples)
        check_update(stage.name, step, values, max_skipped_in_a_row=c.optimizer.max_skipped_in_a_row)
        r.log.log(stage.name, step=step, values=values, total_steps=c.steps)
        stop = stage.stop_asked()
        if stop or stage.due(step) or step == c.steps:
            stage.save(step, _tree(state, reference), cursor=stream.cursor, stop=stop)
    return state.params


def _answers(
    b: Built, r: Resources, c: OnlineConfig, asked: list[Prompt], *, params: Any, version: int, seed: int
) -> list[RolloutGroup]:
    """Scored answers of the policy as it is."""
    with r.log.phase("publish"):
        r.engine.load_weights(version, b.model.merged(r.frozen | params))
    groups, seconds = sample_groups(b, r, asked, num_samples=c.samples_per_prompt, sampling=c.sampling, seed=seed)
    for name, taken in seconds.items():
        r.log.spent(name, taken)
    return groups


def _above_mean(group: RolloutGroup) -> list[float]:
    """What the record shows in place of advantages."""
    rewards = [x.score.reward for x in group.rollouts]
    return [x - sum(rewards) / len(rewards) for x in rewards]


def _comparison(group: RolloutGroup) -> Comparison:
    """The answers of a group, the best first."""
    ranked, before = sorted(group.rollouts, key=lambda x: -x.score.reward), group.prompt.token_ids
    samples = []
    for x in ranked:
        samples.append(Sample(before + x.completion.token_ids, (0,) * len(before) + x.completion.mask))
    return Comparison(tuple(samples), tuple((x.score.reward,) for x in ranked))


def measure(b: Built, r: Resources, c: RewardModelConfig, params: Any, *, step: int) -> dict[str, float] | None:
    """How often a reward model prefers what people did, with a 95 % interval, logged; None without held-out pairs."""
    if c.heldout is None:
        return None
    with r.log.phase("evaluate"):
        pairs: Sequence[Comparison] = r.streams["heldout"].items
        batches, where = pack_comparisons(pairs, c=c.pack)
        scores = jax.jit(reward_model(b.model, c).scores)
        parts = [fetch(scores(params, x.packed, x.last_BPK)) for x in put_rows(b.mesh, batches)]
        scores_BPK = np.concatenate(parts)[..., 0]
    gaps = [float(scores_BPK[at][0] - scores_BPK[at][1]) for at in where]
    mean, low, high = mean_interval([float(gap > 0) for gap in gaps])
    found = {"mean": mean, "low": low, "high": high, "reward": sum(gaps) / len(gaps)}
    r.log.log("eval", step=step, values={"after": "reward_model", **found, "num_prompts": len(gaps)})
    return found


def _logprobs(model: Model, params: Any, batch: PreferenceBatch) -> jax.Array:
    p = batch.packed
    out = model.logprobs(params, p.tokens_BT, p.positions_BT, p.segment_ids_BT, wanted_BT=p.loss_mask_BT)
    return out.logprobs_BT


def _tree(state: Any, reference: Any) -> dict[str, Any]:
    return {"state": state} if reference is None else {"state": state, "reference": reference}
