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


def init_adam(params: Any) -> optax.ScaleByAdamState:
    """Zero moments, each of its parameter's shape and dtype."""
    mu, nu = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
    return optax.ScaleByAdamState(count=jnp.zeros((), jnp.int32), mu=mu, nu=nu)


def adamw(
    c: OptimizerConfig,
    params: Any,
    state: optax.ScaleByAdamState,
    grads: Any,
    *,
    rate: Array,
    scale: Array,
    skip: Array,
) -> tuple[Any, optax.ScaleByAdamState]:
    """AdamW (arXiv 1711.05101) on `scale` x gradients; where `skip` all stays as it is. Norms are not decayed.

    Parameters come from the moments that are kept, so that XLA writes all three over the old ones without a copy.
    """
    count = state.count + ~skip

    def keep(old: Array, new: Array) -> Array:
        return jnp.where(skip, old, new.astype(old.dtype))

    mu = jax.tree.map(lambda m, g: keep(m, c.b1 * m + (1 - c.b1) * g * scale), state.mu, grads)
    nu = jax.tree.map(lambda v, g: keep(v, c.b2 * v + (1 - c.b2) * (g * scale) ** 2), state.nu, grads)
    seen = jnp.maximum(count, 1)  # 0 where the first update is skipped

    def step(path: Any, p: Array, m: Array, v: Array) -> Array:
        direction = m / (1 - c.b1**seen) / (jnp.sqrt(v / (1 - c.b2**seen)) + c.eps)
        decay = 0.0 if "norm" in str(path[-1]) else c.weight_decay
        return keep(p, p - rate * (direction + decay * p))

    return jax.tree_util.tree_map_with_path(step, params, mu, nu), optax.ScaleByAdamState(count=count, mu=mu, nu=nu)


def clip_scale(norm: Array, *, limit: float) -> Array:
    """What gradients of this global norm are multiplied by so that it is at most `limit`; 0 leaves them."""
    return jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-30)) if limit > 0 else jnp.ones(())


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
