"""Supervised fine-tuning: packed conversations in, token-level cross-entropy, one update a step."""

from collections.abc import Mapping
from typing import Any

import jax

from lnjax.build import KEY_STATE, Built, Resources
from lnjax.data.packing import microbatches
from lnjax.data.streams import SftStream, build_sft_stream
from lnjax.health import check_update
from lnjax.learn.loss import LossSum, sft_loss
from lnjax.learn.update import Updater
from lnjax.mesh import put_rows
from lnjax.models.decoder import Model
from lnjax.schema import SftConfig
from lnjax.stage import Position, Stage
from lnjax.types import PackedBatch


def build_stream(b: Built, c: SftConfig) -> SftStream:
    return build_sft_stream(c, b.tokenizer, seed=b.config.seed)


def build_updater(model: Model, c: SftConfig, *, dtype: Any) -> Updater:
    def loss(params: Any, batch: PackedBatch) -> LossSum:
        out = model.logprobs(
            params, batch.tokens_BT, batch.positions_BT, batch.segment_ids_BT, wanted_BT=batch.loss_mask_BT
        )
        return sft_loss(out.logprobs_BT, out.entropy_BT, batch)

    abstract = model.abstract_trained(dtype=dtype)
    return Updater(loss, abstract_params=abstract, c=c.optimizer, total_steps=c.steps, by_layer=model.by_layer())


def run(b: Built, r: Resources, c: SftConfig, *, stage: Stage, start: Position) -> Any:
    """Train until `c.steps`; returns the parameters. Continues where `start` says."""
    updater, stream = build_updater(b.model, c, dtype=b.param_dtype), r.streams["sft"]
    if start.saved is None:
        state = updater.init(start.params(), step=start.updates, rng=jax.random.fold_in(b.key, KEY_STATE))
    else:
        state = stage.restore(start.saved, {"state": updater.abstract_state()})["state"]
        stream.seek(start.saved["cursor"])
    pending: tuple[int, dict[str, Any]] | None = None
    for step in range(start.step + 1, c.steps + 1):
        stage.begin(step)
        with r.log.phase("data"):
            batch = stream.take()
            rows = put_rows(b.mesh, microbatches(batch, rows=c.pack.microbatch_rows))
        with r.log.phase("update"):
            state, stats = updater.update(state, rows, r.frozen)
        tokens = int((batch.segment_ids_BT > 0).sum())
        if pending is not None:  # the device is busy with this step while the last one's numbers are read
            _log(r, c, *pending)
        pending = (step, {**stats, "update_tokens": tokens})
        stop = stage.stop_asked()
        if stop or stage.due(step) or step == c.steps:
            _log(r, c, *pending)
            pending = None
            stage.save(step, {"state": state}, cursor=stream.cursor, stop=stop)
    return state.params


def _log(r: Resources, c: SftConfig, step: int, stats: Mapping[str, Any]) -> None:
    with r.log.phase("update"):
        values = {k: float(v) if k != "update_tokens" else v for k, v in jax.device_get(stats).items()}
    r.log.log("sft", step=step, values=values, total_steps=c.steps)
    check_update("sft", step, values, max_skipped_in_a_row=c.optimizer.max_skipped_in_a_row)
