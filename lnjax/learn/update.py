"""The update step: exact accumulation over microbatches, one optimizer step, donated state.

`loss_fn(params, microbatch) -> LossSum`; what is trained may be a part of `params`, the rest comes with every call and stays
as it is. Gradients of loss *sums* add up in float32 and are divided by the total count
once, so neither the number of microbatches nor the number of devices changes the result. The microbatch program has a
static shape and is compiled once, whatever number of microbatches a batch has.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lnjax.learn.loss import LossSum, add_metrics, mean_metrics
from lnjax.learn.optimizer import adamw, clip_scale, guard_update, init_adam, init_guard, learning_rate
from lnjax.mesh import platform
from lnjax.schema import OptimizerConfig
from lnjax.types import PackedBatch, TrainState

LossFn = Callable[[Any, Any], LossSum]
View = Callable[[Any], Any]
REPLICAS = PartitionSpec("data")


class Updater:
    """Compiled update of one stage. `update(state, microbatches) -> (state, stats)`; the old state is consumed."""

    def __init__(
        self,
        loss_fn: LossFn,
        *,
        abstract_params: Any,
        c: OptimizerConfig,
        total_steps: int,
        by_layer: tuple[View, View] | None = None,
    ):
        """`abstract_params`: ShapeDtypeStructs with shardings; gradients and optimizer state lie as they do. `by_layer`: the
        view of parameters that `loss_fn` computes with, made once an update, and the way back for the gradients."""
        self._schedule = learning_rate(c, total_steps=total_steps)
        self._c = c
        self._params = abstract_params
        view, self._back = by_layer or (_same, _same)
        self._viewed = view(abstract_params)
        where = jax.tree.map(lambda x: x.sharding, self._viewed)
        self._mesh = jax.tree.leaves(where)[0].mesh
        self.view = jax.jit(view, out_shardings=where) if by_layer else _same  # what the gradient's program is given
        state = jax.tree.map(lambda x: x.sharding, self.abstract_state())
        gradient = by_replica(functools.partial(_gradient, loss_fn), mesh=self._mesh)
        parts = jax.tree.map(_part, where)
        self._first = jax.jit(gradient, out_shardings=(parts, None))
        self._next = jax.jit(functools.partial(_accumulate, gradient), out_shardings=(parts, None), donate_argnums=(2,))
        self._sum = jax.jit(functools.partial(_sum, mesh=self._mesh), out_shardings=(where, None))
        self._apply = jax.jit(
            jax.named_scope("optimizer")(self._apply_gradient), out_shardings=(state, None), donate_argnums=(0,)
        )
        self._init = jax.jit(self._init_state, out_shardings=state, donate_argnums=(0,))

    def init(self, params: Any, *, step: int, rng: Array) -> TrainState:
        """A fresh state that takes over `params` (donated)."""
        return self._init(params, jnp.asarray(step, jnp.int32), rng)

    def _init_state(self, params: Any, step: Array, rng: Array) -> TrainState:
        return TrainState(step=step, params=params, opt_state=init_adam(params), guard=init_guard(), rng=rng)

    def abstract_state(self) -> TrainState:
        """The state as ShapeDtypeStructs with shardings, for restoring a checkpoint."""
        replicated = NamedSharding(self._mesh, PartitionSpec())
        rng = jax.eval_shape(lambda: jax.random.key(0))
        shapes = jax.eval_shape(self._init_state, self._params, jax.ShapeDtypeStruct((), jnp.int32), rng)
        return TrainState(
            step=place(shapes.step, replicated),
            params=self._params,
            opt_state=shapes.opt_state._replace(
                count=place(shapes.opt_state.count, replicated), mu=self._params, nu=self._params
            ),
            guard=jax.tree.map(lambda x: place(x, replicated), shapes.guard),
            rng=place(shapes.rng, replicated),
        )

    def abstract_gradient(self, batch: Any, frozen: Any = None) -> tuple[Any, LossSum]:
        """What adds up over microbatches, as ShapeDtypeStructs with shardings. `batch`: one microbatch of ShapeDtypeStructs."""
        grads, sums = jax.eval_shape(self._first, self._viewed, frozen or {}, batch)
        whole = _part(NamedSharding(self._mesh, PartitionSpec()))
        grads = jax.tree.map(lambda g, p: place(g, _part(p.sharding)), grads, self._viewed)
        return grads, jax.tree.map(lambda x: place(x, whole), sums)

    def lower(
        self, state: TrainState, so_far: tuple[Any, LossSum], batch: Any, *, accumulate: bool, frozen: Any = None
    ) -> dict[str, Any]:
        """The programs of `update`, lowered for abstract arguments: where they will run need not be here."""
        given = self._viewed, frozen or {}
        gradient = self._next.lower(*given, so_far, batch) if accumulate else self._first.lower(*given, batch)
        return {"gradient": gradient, "apply": self._apply.lower(state, *so_far)}

    def gradient(self, params: Any, microbatches: Sequence[Any], frozen: Any = None) -> tuple[Any, LossSum]:
        """(gradient of the loss *sum* in the view that the loss has, summed LossSum). `frozen`: parameters beside `params` that
        have none."""
        return self._sum(*self._parts(params, microbatches, frozen))

    def _parts(self, params: Any, microbatches: Sequence[Any], frozen: Any) -> tuple[Any, LossSum]:
        params = self.view(params)
        grads, sums = self._first(params, frozen or {}, microbatches[0])
        for batch in microbatches[1:]:
            grads, sums = self._next(params, frozen or {}, (grads, sums), batch)
        return grads, sums

    def update(
        self, state: TrainState, microbatches: Sequence[Any], frozen: Any = None
    ) -> tuple[TrainState, dict[str, Array]]:
        """One optimizer step over all microbatches. Stats are float32 scalars still on the device."""
        return self._apply(state, *self._parts(state.params, microbatches, frozen))

    def _apply_gradient(self, state: TrainState, grads: Any, sums: LossSum) -> tuple[TrainState, dict[str, Array]]:
        grads, sums = _sum(grads, sums, mesh=self._mesh)
        count, grads = jnp.maximum(sums.count, 1e-9), self._back(grads)
        loss, norm = sums.total / count, optax.global_norm(grads) / count
        skip, guard = guard_update(state.guard, step=state.step, norm=norm, loss=loss, factor=self._c.spike_factor)
        rate = jnp.asarray(self._schedule(state.opt_state.count), jnp.float32)
        scale = clip_scale(norm, limit=self._c.clip_norm) / count
        params, opt_state = adamw(self._c, state.params, state.opt_state, grads, rate=rate, scale=scale, skip=skip)
        new = TrainState(step=state.step + 1, params=params, opt_state=opt_state, guard=guard, rng=state.rng)
        stats = {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": rate,
            "skipped": guard.num_skipped.astype(jnp.float32),
            "skipped_in_a_row": guard.num_skipped_in_a_row.astype(jnp.float32),
            **mean_metrics(sums.metrics),
        }
        return new, stats


def place(x: Any, where: NamedSharding) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def _same(params: Any) -> Any:
    return params


def _gradient(loss_fn: LossFn, params: Any, frozen: Any, batch: Any) -> tuple[Any, LossSum]:
    def total(params):
        sums = loss_fn(frozen | params, batch)
        return sums.total, sums

    grads, sums = jax.grad(total, has_aux=True)(params)
    return jax.tree.map(lambda g: g.astype(jnp.float32), grads), sums


def by_replica(gradient: Callable[..., Any], *, mesh: Mesh) -> Callable[..., Any]:
    """`gradient(params, frozen, batch)` of every replica (mesh axis `data`) over its own rows, along a new first dim: replicas
    meet once an update instead of once a microbatch. A single replica has no such dim. On CPUs, whose cores
    replicas share, one whose rows are all padding computes nothing."""
    if mesh.shape["data"] == 1:
        return gradient

    def own(*args: Any) -> Any:
        found = functools.partial(gradient, *args)
        if platform(mesh) == "cpu":
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(found))
            found = functools.partial(jax.lax.cond, _filled(args[-1]), found, lambda: zeros)
        return jax.tree.map(lambda x: x[None], found())

    split = functools.partial(jax.shard_map, own, mesh=mesh, out_specs=REPLICAS, axis_names={"data"}, check_vma=False)

    def run(params: Any, frozen: Any, batch: Any) -> Any:
        rows = jax.tree.map(lambda x: REPLICAS if x.ndim else PartitionSpec(), batch)
        return split(in_specs=(PartitionSpec(), PartitionSpec(), rows))(params, frozen, batch)

    return run


def _filled(batch: Any) -> Array:
    packed = batch if isinstance(batch, PackedBatch) else batch.packed
    return (packed.segment_ids_BT > 0).any()


def _part(where: NamedSharding) -> NamedSharding:
    """Of what `by_replica` returns for an array that lies so."""
    return where if where.mesh.shape["data"] == 1 else NamedSharding(where.mesh, PartitionSpec(*REPLICAS, *where.spec))


def _sum(grads: Any, sums: LossSum, *, mesh: Mesh) -> tuple[Any, LossSum]:
    if mesh.shape["data"] == 1:
        return grads, sums
    grads, total, count = jax.tree.map(lambda x: x.sum(0), (grads, sums.total, sums.count))
    metrics = {k: x.max(0) if k.endswith("_max") else x.sum(0) for k, x in sums.metrics.items()}
    return grads, LossSum(total, count, metrics)


def _accumulate(
    gradient: Callable[..., Any], params: Any, frozen: Any, so_far: tuple[Any, LossSum], batch: Any
) -> tuple[Any, LossSum]:
    grads, sums = so_far
    more, new = gradient(params, frozen, batch)
    total = LossSum(sums.total + new.total, sums.count + new.count, add_metrics(sums.metrics, new.metrics))
    return jax.tree.map(jnp.add, grads, more), total
