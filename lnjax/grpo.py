"""Group-relative policy optimization: sample, score, credit, pack, update, publish, keep."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import compress
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lnjax.build import KEY_STATE, Built, Resources
from lnjax.data.curriculum import describe_batch
from lnjax.data.packing import microbatches, pack
from lnjax.data.streams import PromptStream, build_prompt_stream
from lnjax.errors import RolloutError
from lnjax.health import check_update
from lnjax.learn.advantage import group_advantages, loss_weight
from lnjax.learn.loss import LossSum, grpo_loss
from lnjax.learn.update import Updater
from lnjax.mesh import put_rows
from lnjax.models.decoder import Model
from lnjax.parity import Parity
from lnjax.schema import GrpoConfig
from lnjax.score import describe_groups
from lnjax.source import RolloutSource
from lnjax.stage import Position, Stage
from lnjax.types import RlBatch, RolloutGroup, Sample

FIRST_PART = ("sampler_kl", "prob_error")
"""Compare the engine's logprobs with the learner's on the same weights: only before the cycle's first update."""


def build_stream(b: Built, c: GrpoConfig) -> PromptStream:
    return build_prompt_stream(c.prompts, b.tokenizer, curriculum=c.curriculum, batch_size=c.prompts_per_step)


def build_updater(model: Model, c: GrpoConfig, *, dtype: Any) -> Updater:
    def loss(params: Any, batch: RlBatch) -> LossSum:
        packed = batch.packed
        out = model.logprobs(
            params,
            packed.tokens_BT,
            packed.positions_BT,
            packed.segment_ids_BT,
            temperature=c.sampling.temperature,
            wanted_BT=packed.loss_mask_BT,
        )
        return grpo_loss(out.logprobs_BT, out.entropy_BT, batch, c=c.loss)

    abstract = model.abstract_trained(dtype=dtype)
    steps = c.steps * c.updates_per_step
    return Updater(loss, abstract_params=abstract, c=c.optimizer, total_steps=steps, by_layer=model.by_layer())


def run(b: Built, r: Resources, c: GrpoConfig, *, stage: Stage, start: Position) -> Any:
    """Train until `c.steps`; returns the parameters. Continues where `start` says."""
    updater, prompts = build_updater(b.model, c, dtype=b.param_dtype), r.streams["grpo"]
    score = jax.jit(_logprobs_program(b), static_argnames="temperature")
    logprobs, parity = partial(score, temperature=c.sampling.temperature), Parity(b, r, c, logprobs=score)
    reference = None
    if start.saved is None:
        params = start.params()
        if c.loss.kl_coef > 0:
            reference = jax.tree.map(jnp.copy, params)
        state = updater.init(params, step=start.updates, rng=jax.random.fold_in(b.key, KEY_STATE))
    else:
        abstract = updater.abstract_state()
        tree = stage.restore(start.saved, _tree(abstract, abstract.params if c.loss.kl_coef > 0 else None))
        state, reference = tree["state"], tree.get("reference")
        prompts.seek(start.saved["cursor"])
    updates = start.updates + start.step * c.updates_per_step
    if start.step < c.steps:
        with r.log.phase("publish"):
            r.engine.load_weights(updates, b.model.merged(r.frozen | state.params))
    with contextlib.closing(RolloutSource(b, r, c, prompts=prompts, first=start.step + 1)) as source:
        for rl_step in range(start.step + 1, c.steps + 1):
            stage.begin(rl_step)
            # 1 sample, 2 score: here and now, or by a thread that is at most max_staleness steps ahead
            rollouts = source.take()
            groups, values = rollouts.groups, describe(rollouts.groups, c, updates=updates)
            with r.log.phase("parity"):
                values |= parity.check(groups, rl_step=rl_step, params=r.frozen | state.params, updates=updates)
            # 3 credit, 4 pack: one scalar per rollout inside its group; static shapes
            with r.log.phase("pack"):
                size = len(groups) // c.updates_per_step
                parts = [credit(groups[i * size : (i + 1) * size], c=c) for i in range(c.updates_per_step)]
                batches = [put_rows(b.mesh, pack_part(part, c=c, first=i == 0)) for i, part in enumerate(parts)]
            # old and reference logprobs before any update, where they are needed
            with r.log.phase("logprobs"):
                for i, batch in enumerate(batches):
                    if i > 0:
                        batches[i] = batch = _fill(batch, "old_logprobs_BT", logprobs, r.frozen | state.params)
                    if reference is not None:
                        batches[i] = _fill(batch, "ref_logprobs_BT", logprobs, r.frozen | reference)
            # 5 update: the only place parameters change
            with r.log.phase("update"):
                stats = []
                for batch in batches:
                    state, more = updater.update(state, batch, r.frozen)
                    stats.append(more)
                # the device is busy meanwhile
                r.record.keep("grpo", step=rl_step, groups=groups, credit=partial(advantages_of, c=c))
                values = _combine(jax.device_get(stats)) | values
                updates += len(batches)
            values["prompts_taken"] = taken = rollouts.cursor["next"]
            if c.curriculum:
                rates = [g.prompt.pass_rate or 0.0 for g in groups]
                fit, batch = len(prompts.prompts) // c.prompts_per_step, taken // c.prompts_per_step - 1
                values |= describe_batch(rates, batch=batch, num_batches=fit, c=c.curriculum)
            values["update_tokens"] = sum(len(s.token_ids) for part in parts for group in part for s in group)
            check_update("grpo", rl_step, values, max_skipped_in_a_row=c.optimizer.max_skipped_in_a_row)
            # 6 publish: returns once the engine serves these weights, else raises
            with r.log.phase("publish"):
                r.engine.load_weights(updates, b.model.merged(r.frozen | state.params))
                source.served(rl_step)
            r.log.log("grpo", step=rl_step, values=values, total_steps=c.steps)
            # 7 keep
            stop = stage.stop_asked()
            if stop or stage.due(rl_step) or rl_step == c.steps:
                stage.save(rl_step, _tree(state, reference), cursor=rollouts.cursor, stop=stop)
    return state.params


def advantages_of(group: RolloutGroup, *, c: GrpoConfig) -> list[float]:
    rewards = [x.score.reward for x in group.rollouts]
    return group_advantages(rewards, [x.completion.finished for x in group.rollouts], c=c.advantage).tolist()


def credit(groups: Sequence[RolloutGroup], *, c: GrpoConfig) -> list[list[Sample]]:
    """Each rollout as prompt and completion with its advantage, by group; overlong ones are left out where filtered."""
    found = []
    for group in groups:
        samples: list[Sample] = []
        found.append(samples)
        for rollout, advantage in zip(group.rollouts, advantages_of(group, c=c), strict=True):
            if c.advantage.overlong_filter and not rollout.completion.finished:
                continue
            before, completion = group.prompt.token_ids, rollout.completion
            samples.append(
                Sample(
                    token_ids=before + completion.token_ids,
                    loss_mask=(0,) * len(before) + completion.mask,
                    sampler_logprobs=(0.0,) * len(before) + completion.logprobs,
                    advantage=float(advantage),
                )
            )
    return found


def pack_part(groups: Sequence[Sequence[Sample]], *, c: GrpoConfig, first: bool) -> list[RlBatch]:
    """Microbatches (host arrays) of one update. The samples of a group share their prompt's tokens, where they may."""
    packing = pack(groups if c.pack.share_prompts else [[s] for group in groups for s in group], c=c.pack)
    weights, count_B = [], np.zeros((packing.num_rows,), np.float32)
    for sample, place in zip(packing.samples, packing.places, strict=True):
        weight, count = loss_weight(
            num_tokens=sum(sample.loss_mask), aggregation=c.loss.aggregation, max_new_tokens=c.sampling.max_new_tokens
        )
        weights.append(weight)
        count_B[place.row] += count
    packed = packing.batch()
    zeros = np.zeros_like(packed.loss_mask_BT)
    fields: dict[str, Any] = {
        "advantages_BT": packing.scatter([s.advantage for s in packing.samples], masked=True),
        "weights_BT": packing.scatter(weights, masked=True),
        "count_B": count_B,
        "sampler_logprobs_BT": packing.scatter([s.sampler_logprobs for s in packing.samples]),
        "old_logprobs_BT": zeros,
        "ref_logprobs_BT": zeros,
        "on_policy": np.asarray(first),
    }
    batch = RlBatch(packed=packed, **fields)
    return microbatches(batch, rows=c.pack.microbatch_rows)


def _logprobs_program(b: Built) -> Any:
    def logprobs(params, packed, *, temperature):
        out = b.model.logprobs(
            params,
            packed.tokens_BT,
            packed.positions_BT,
            packed.segment_ids_BT,
            temperature=temperature,
            wanted_BT=packed.loss_mask_BT,
        )
        return out.logprobs_BT

    return logprobs


def _fill(batches: Sequence[RlBatch], name: str, logprobs: Any, params: Any) -> list[RlBatch]:
    return [dataclasses.replace(x, **{name: logprobs(params, x.packed)}) for x in batches]


def _tree(state: Any, reference: Any) -> dict[str, Any]:
    return {"state": state} if reference is None else {"state": state, "reference": reference}


def _combine(stats: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean over the cycle's updates; maxima stay maxima, guards and the engine's parity are taken where they count."""
    values = {}
    for key in stats[0]:
        column = [float(s[key]) for s in stats]
        if key in FIRST_PART:
            values[key] = column[0]
        elif key in ("skipped", "skipped_in_a_row", "learning_rate"):
            values[key] = column[-1]
        elif key == "tokens":
            values["loss_tokens"] = int(sum(column))
        else:
            values[key] = max(column) if key.endswith("_max") else sum(column) / len(column)
    return values


def describe(groups: Sequence[RolloutGroup], c: GrpoConfig, *, updates: int) -> dict[str, Any]:
    """What the rollouts were like. Raises RolloutError for a token staler than allowed."""
    said = [x.completion for g in groups for x in g.rollouts]
    behind = [-(-(updates - v) // c.updates_per_step) for x in said for v in compress(x.versions, x.mask)]
    if max(behind) > c.max_staleness or min(behind) < 0:
        raise RolloutError(
            f"a token is of weights {max(behind)} steps behind the learner's and another {min(behind)}; allowed are 0 to "
            f"grpo.max_staleness={c.max_staleness}"
        )
    return {
        **describe_groups(groups),
        "version": max(x.versions[-1] for x in said),
        "staleness_mean": sum(behind) / len(behind),
        "staleness_max": max(behind),
    }
