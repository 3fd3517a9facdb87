"""AdamW with a schedule, gradient clipping and the guard that skips bad updates."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from lnjax.schema import OptimizerConfig
from lnjax.types import GuardState

GUARD_MEMORY = 0.95  # share of the running gradient norm kept at each accepted update
GUARD_WARMUP = 10  # updates before a spike can be told from a start


def learning_rate(c: OptimizerConfig, *, total_steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then constant or cosine down to min_learning_rate at `total_steps`."""
    if c.schedule == "cosine":
        after = optax.cosine_decay_schedule(
            c.learning_rate, max(1, total_steps - c.warmup_steps), alpha=c.min_learning_rate / c.learning_rate
        )
    else:
        after = optax.constant_schedule(c.learning_rate)
    if not c.warmup_steps:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, c.learning_rate, c.warmup_steps), after], [c.warmup_steps])


def build_optimizer(c: OptimizerConfig, *, total_steps: int) -> optax.GradientTransformation:
    """Clipping is done by the update step, which reports the norm before it."""

    def decayed(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: "norm" not in str(path[-1]), params)

    return optax.adamw(
        learning_rate(c, total_steps=total_steps),
        b1=c.b1,
        b2=c.b2,
        eps=c.eps,
        weight_decay=c.weight_decay,
        mask=decayed,
    )


def clip(grads: Any, *, norm: Array, limit: float) -> Any:
    """Scale gradients so that their global norm is at most `limit`; 0 leaves them."""
    if limit <= 0:
        return grads
    scale = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-30))
    return jax.tree.map(lambda g: g * scale, grads)


def init_guard() -> GuardState:
    # Distinct buffers: the state is donated, and one buffer cannot be donated twice.
    return GuardState(
        grad_norm_mean=jnp.zeros((), jnp.float32),
        num_skipped=jnp.zeros((), jnp.int32),
        num_skipped_in_a_row=jnp.zeros((), jnp.int32),
    )


def guard_update(
    guard: GuardState, *, step: Array, norm: Array, loss: Array, factor: float
) -> tuple[Array, GuardState]:
    """(True where this update must be skipped, the next guard)."""
    bad = ~(jnp.isfinite(norm) & jnp.isfinite(loss))
    if factor > 0:
        bad |= (step >= GUARD_WARMUP) & (norm > factor * guard.grad_norm_mean)
    first = guard.grad_norm_mean == 0
    mean = jnp.where(first, norm, GUARD_MEMORY * guard.grad_norm_mean + (1 - GUARD_MEMORY) * norm)
    return bad, GuardState(
        grad_norm_mean=jnp.where(bad, guard.grad_norm_mean, mean),
        num_skipped=guard.num_skipped + bad,
        num_skipped_in_a_row=jnp.where(bad, guard.num_skipped_in_a_row + 1, 0),
    )
